"""Write a run as one script to paste into an issue: the script repeats each rank's collectives and locks in order.

Only the collectives and locks are kept, not the model. A hang that follows from the order of the ranks' collectives
happens again. A hang that needs the model's arithmetic, a device, a race in a backend or the death of a rank cannot be
replayed: then ReplayError is raised.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from repro.report.gather import RunData, headline
from repro.store.text import escape_control_characters
from repro.trace.witness.file import Witness, read_dir
from repro.trace.witness.format import Kind
from repro.verdict.result import list_ranks
from repro.watch.document import Document

TEMPLATE = Path(__file__).parent / "replay_template.txt"
EP_DEADLOCK = Path(__file__).parents[1] / "ep_deadlock.py"
"""A script with a small model that repeats the hang of metadata_rebuild, and its fix, on at most 8 ranks."""

_USAGE_OF_FIX = """\
    torchrun --standalone --nproc-per-node {} THIS_FILE --fix    the run with the fix, up to the same step, exits with 0
"""
_OPTION = """parser.add_argument("--fix", action="store_true", help="replay the run with the fix")\n"""
OPS = ("all_reduce", "all_gather_v", "reduce_scatter_v", "all_gather", "broadcast", "barrier")


class ReplayError(ValueError):
    """A run that cannot be replayed. The text of the error gives the reason."""


class Act(NamedTuple):
    """One action of a rank: a collective, or an action whose `op` is "acquire", "release", "ask" or "die".

    name   the group of the collective, or the lock
    op     for a collective, its operation. "acquire" and "release": of a lock. "ask": the rank asked for a lock that it
           never got. "die": the rank failed, or its process ended
    where  step or phase, and layer; for "die", the error
    """

    name: str
    op: str
    where: str = ""
    sizes: tuple[int, ...] = ()
    dtype: str = ""
    reduce_op: str = ""
    root: int = -1


def is_that_of_ep_deadlock(verdict: Document) -> bool:
    """Whether this is the verdict on the hang in repro/ep_deadlock.py: the fault of the scenario metadata_rebuild."""
    parts = (verdict.scenario, verdict.variant, verdict.verdict, verdict.cause)
    return parts == ("metadata_rebuild", "fault", "deadlock", "extra")


def of_runs(fault: RunData, fix: Path | None) -> str:
    """Return the source of a script that replays the faulty run.

    Started with --fix, the script replays the fixed run instead, up to the step in which the faulty run hung.

    fix: the run directory of the fixed run; None for a script without --fix

    Raises ReplayError if a replay cannot repeat the hang of the faulty run, or if a witness of one of the two runs is
    missing or incomplete.
    """
    _refuse_what_would_not_hang(fault.verdict)
    programs, groups = _programs(fault.root, None)
    stuck = [p.step for p in fault.verdict.ranks if p.state in ("blocked", "locked", "dead", "failed")]
    if not stuck:
        raise ReplayError("no rank of this run waits, so there is no hang to replay")
    cured: dict[int, list[Act]] = {}
    if fix is not None:
        cured, _ = _programs(fix, max(max(stuck) + 1, 1))
    for rank, position in ((p.rank, p) for p in fault.verdict.ranks):
        if position.state in ("dead", "failed") and rank in programs:
            programs[rank].append(Act("", "die", position.detail[:60]))
    table = list(dict.fromkeys(act for program in (*programs.values(), *cured.values()) for act in program))
    number = {act: k for k, act in enumerate(table)}
    stale = _stale_locks(programs)
    return _fill(
        TEMPLATE.read_text(),
        {
            "TITLE": _prose(f"{fault.verdict.scenario} on {len(programs)} ranks", 90),
            "CLAIM": textwrap.fill(_prose(headline(fault.verdict), 500), 100, subsequent_indent="    "),
            "RANKS": str(len(programs)),
            "GROUPS": _literal("GROUPS", {name: list(members) for name, members in groups.items()}),
            "ACTS": _rows("ACTS", [tuple(act) for act in table]),
            "FAULT": _classes("FAULT", programs, number),
            "FIX": _classes("FIX", cured, number) + "\n" if cured else "",
            "USAGE": _USAGE_OF_FIX.format(len(programs)) if cured else "",
            "OPTION": _OPTION if cured else "",
            "PROGRAMS": "FIX if args.fix else FAULT" if cured else "FAULT",
            "STALE": _literal("STALE_LOCKS", stale),
        },
    )


def _refuse_what_would_not_hang(verdict: Document) -> None:
    """Raise ReplayError if the order of collectives does not explain the ranks' waits."""
    if verdict.verdict != "deadlock":
        reason = f"the verdict is {verdict.verdict}" if verdict.verdict else "there is no verdict"
        raise ReplayError(
            f"{reason}; only a deadlock can be replayed, because it follows from the order in which ranks issue "
            "collectives"
        )
    meetings: dict[tuple[str, int], set[tuple[str, tuple[int, ...]]]] = {}
    for p in verdict.ranks:
        if p.state == "blocked":
            meetings.setdefault((p.group, p.seq), set()).add((p.op, p.sizes))
    if verdict.cause == "sizes" or any(len(calls) > 1 for calls in meetings.values()):
        raise ReplayError(
            "ranks paired different operations or sizes, and only a race in the backend decides whether the ranks hang"
        )


def _programs(root: Path, steps: int | None) -> tuple[dict[int, list[Act]], dict[str, tuple[int, ...]]]:
    """Return, for each rank, its actions before step ``steps`` (None: all actions), and for each group its members.

    Raises ReplayError if a witness is missing or incomplete, or has an action that cannot be replayed.
    """
    witnesses, refused = read_dir(root / "events")
    if refused or not witnesses:
        raise ReplayError(refused[0] if refused else f"{root}: no rank has left a witness file")
    if len(witnesses) != next(iter(witnesses.values())).writer.num_ranks:
        raise ReplayError(f"{root}: the witnesses of some ranks are missing; there are only {len(witnesses)}")
    groups: dict[str, tuple[int, ...]] = {}
    programs = {}
    for rank, witness in sorted(witnesses.items()):
        if witness.first_event > 1 or not witness.complete:
            raise ReplayError(
                f"{witness.name}: the oldest events were overwritten, or the newest events are incomplete, so "
                "the run cannot be replayed"
            )
        for group in witness.groups:
            if groups.setdefault(group.name, group.members) != group.members:
                raise ReplayError(
                    f"{witness.name}: group {group.name} has different members in the witnesses of other ranks"
                )
        programs[rank] = list(_acts(witness, steps))
    return programs, groups


def _acts(witness: Witness, steps: int | None) -> Iterator[Act]:
    asked: dict[int, Act] = {}
    for event in witness.events():
        if steps is not None and event.step >= steps:
            return
        where = f"step {event.step}" if event.step >= 0 else witness.text(event.phase)
        match event.kind:
            case Kind.ENTER:
                group, op, layer, dtype, reduce_op = witness.signature(event.sig)
                if op not in OPS:
                    raise ReplayError(f"{witness.name}: {op} cannot be replayed")
                sizes = witness.sizes(event.vector, event.num_sizes)
                yield Act(group, op, f"{where} {layer}".strip(), sizes, dtype, reduce_op, event.aux)
            case Kind.ISSUE | Kind.WAIT:
                raise ReplayError(f"{witness.name}: asynchronous collectives cannot be replayed")
            case Kind.LOCK_WAIT:
                asked[event.sig] = Act(witness.text(event.sig), "ask", where)
            case Kind.LOCK_HELD:
                yield asked.pop(event.sig, Act(witness.text(event.sig), "", where))._replace(op="acquire")
            case Kind.LOCK_FREED:
                if asked.pop(event.sig, None) is None:  # otherwise the rank only waited for the lock file to disappear
                    yield Act(witness.text(event.sig), "release", where)
            case _:
                pass
    if witness.last is not None and witness.last.kind == Kind.LOCK_WAIT:
        yield asked[witness.last.sig]


def _stale_locks(programs: Mapping[int, Sequence[Act]]) -> list[str]:
    """Return the locks that a rank asked for, but no rank ever held: something outside the job held them.

    programs: for each rank, its actions in order
    """
    acts = {act for program in programs.values() for act in program}
    had = {act.name for act in acts if act.op in ("acquire", "release")}
    return sorted({act.name for act in acts if act.op == "ask"} - had)


def _classes(name: str, programs: Mapping[int, Sequence[Act]], number: Mapping[Act, int]) -> str:
    """Return the ranks' programs (lists of actions) as Python source. Ranks with equal programs share one.

    name: the variable to which the source assigns the programs
    number: for each action, its place in the source's list of all actions
    """
    together: dict[tuple[int, ...], list[int]] = {}
    for rank, program in programs.items():
        together.setdefault(tuple(number[act] for act in program), []).append(rank)
    lines = [f"{name} = {{"]
    for acts, ranks in together.items():
        lines.append(f"    # ranks {list_ranks(ranks)}" if len(ranks) > 1 else f"    # rank {ranks[0]}")
        lines += textwrap.wrap(
            f"{tuple(ranks)}: {_runs(acts)},", 112, initial_indent="    ", subsequent_indent="        "
        )
    return "\n".join([*lines, "}"])


def _runs(acts: Sequence[int]) -> str:
    """Write numbers as a Python list, with consecutive numbers as ranges: "[3, *range(5, 9)]"."""
    parts: list[str] = []
    k = 0
    while k < len(acts):
        end = k
        while end + 1 < len(acts) and acts[end + 1] == acts[end] + 1:
            end += 1
        parts.append(f"*range({acts[k]}, {acts[end] + 1})" if end - k > 2 else ", ".join(map(str, acts[k : end + 1])))
        k = end + 1
    return f"[{', '.join(parts)}]"


def _rows(name: str, rows: Sequence[tuple[object, ...]]) -> str:
    return "\n".join([f"{name} = [", *(f"    {row!r}," for row in rows), "]"])


def _literal(name: str, value: object) -> str:
    return f"{name} = {value!r}"


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """Replace each "@NAME@" in a template by ``parts["NAME"]``, but not a "@NAME@" within the inserted text."""
    return re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], template)


def _prose(text: str, limit: int) -> str:
    """Escape untrusted text so that it cannot end a docstring, and cut it to ``limit`` characters."""
    return escape_control_characters(text, limit).replace("\\", "/").replace('"', "'")
