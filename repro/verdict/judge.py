"""The judge: derive the position of each rank and the wait-for graph, then apply the first of these rules that fits.

1. Ranks completed different collectives under one sequence number, or results are wrong: `corrupt`; `inconclusive` if
   the different collectives were only queued on the devices (NCCL).
2. Every rank is done: `clean`; `inconclusive` if the witnesses lack what ranks must have in common, such as sizes.
3. The waits form a cycle: `deadlock`; `inconclusive` before the quiet window has passed. This rule is left out if a
   rank died or failed in a collective that members issued with different arguments: then rule 4 applies.
4. A rank died or failed: `crash`; `inconclusive` if the user interrupted the ranks.
5. Otherwise follow the waits from rank to rank to their end, and judge by what the last rank does
   (`repro.verdict.rules.waiting`): it works, is done, left no witness, or is in a collective that all members entered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from repro.trace.knowledge import COLLECTIVES, Knows
from repro.trace.witness.file import Witness
from repro.trace.witness.format import Identity
from repro.verdict.case import Case
from repro.verdict.evidence.graph import wait_graph
from repro.verdict.evidence.ledger import CallVariant, Ledger
from repro.verdict.evidence.position import GroupKey, clocks, locate
from repro.verdict.facts import Facts
from repro.verdict.result import Finding, Verdict, name_ranks
from repro.verdict.rules.crash import crash, victims
from repro.verdict.rules.deadlock import deadlock
from repro.verdict.rules.explain import explain
from repro.verdict.rules.waiting import waiting

NO_FACTS = Facts()


def judge(
    witnesses: Mapping[int, Witness],
    facts: Facts = NO_FACTS,
    *,
    num_ranks: int,
    now_ns: int | Mapping[int, int],
    quiet_window_s: float,
    home: Identity | None = None,
    wrong_numbers: Sequence[str] = (),
    queued: Collection[str] = (),
) -> Verdict:
    """Derive the verdict from the witnesses and the facts of a run.

    witnesses       rank -> the rank's witness
    facts           observations of the ranks' processes; a rank whose process was not observed counts as alive
    num_ranks       number of ranks of the run, including ranks without a witness
    now_ns          when the witnesses were read: the time on the monotonic clock of one host, or rank -> the time on
                    the clock of the rank's host
    quiet_window_s  a hang is reported only if no rank has recorded an event for this many seconds
    home            if ``now_ns`` is one number: a process of the host whose clock gave this number; by default
                    the process of the lowest rank
    wrong_numbers   one line for each result that differs from the reference. If there is a line, the verdict is
                    `corrupt`, unless ranks queued different collectives in a group of ``queued``: then `inconclusive`
    queued          names of the groups whose collectives are recorded as complete when the rank has queued them on its
                    device, as on NCCL
    """
    usable, notes = _one_run(witnesses, num_ranks)
    nows, clock_notes = clocks(usable, now_ns, home)
    rank_states = {
        rank: locate(rank, usable.get(rank), nows.get(rank, 0), facts.alive.get(rank), facts.excused.get(rank, ""))
        for rank in range(num_ranks)
    }
    notes += clock_notes + [problem for witness in usable.values() for problem in witness.problems]
    damaged = {rank for rank, witness in usable.items() if witness.damaged}
    sound = {rank: witness for rank, witness in usable.items() if rank not in damaged}
    ledger = Ledger({rank: witness for rank, witness in sound.items() if Knows.ORDER in witness.knows})
    waits = wait_graph(rank_states, ledger, facts.lock_holders)
    quiet_ns = [max(0, nows[rank] - witness.last_event_ns()) for rank, witness in usable.items() if witness.last]
    quiet_s = min(quiet_ns, default=0) / 1e9
    case = Case(
        sound,
        rank_states,
        ledger,
        waits,
        quiet_s,
        quiet_window_s,
        notes,
        facts,
        queued,
        now_s=(now_ns.get(min(now_ns, default=0), 0) if isinstance(now_ns, Mapping) else now_ns) / 1e9,
    )
    return _qualify_for_damage(_decide(case, wrong_numbers), damaged)


def _qualify_for_damage(verdict: Verdict, damaged: set[int]) -> Verdict:
    """Turn each culprit with a damaged witness into a suspect, and a `clean` verdict into `inconclusive`.

    Also lower the confidence to `likely`, or to `undecided` if no culprit is left, and add a line of evidence. If no
    witness is damaged, return the verdict unchanged.

    damaged   the ranks whose witness is damaged
    """
    if not damaged:
        return verdict
    culprits = tuple(rank for rank in verdict.culprits if rank not in damaged)
    text = f"the witness of {name_ranks(sorted(damaged))} is damaged: its unreadable part could change the verdict"
    return replace(
        verdict,
        verdict="inconclusive" if verdict.verdict == "clean" else verdict.verdict,
        culprits=culprits,
        suspects=tuple(sorted({*verdict.suspects, *verdict.culprits} - {*culprits})),
        confidence="likely" if verdict.confidence != "undecided" and culprits else "undecided",
        evidence=(*verdict.evidence, text),
    )


def _one_run(witnesses: Mapping[int, Witness], num_ranks: int) -> tuple[dict[int, Witness], list[str]]:
    """Return the witnesses of one run, and a line for each witness that is left out.

    If the witnesses are of several runs, take the run with the most witnesses; if two runs have the most, take no
    witness. A witness is also left out if its header has another rank or another number of ranks.
    """
    runs = Counter((witness.writer.run_id, witness.writer.num_ranks) for witness in witnesses.values())
    notes: list[str] = []
    usable: dict[int, Witness] = {}
    most = runs.most_common(2)
    tied = len(most) == 2 and most[0][1] == most[1][1]
    run = most[0][0] if most else ("", num_ranks)
    for rank, witness in sorted(witnesses.items()):
        writer = witness.writer
        if tied:
            notes.append(
                f"{witness.name}:0: the file belongs to run {writer.run_id!r}, but as many files belong to another "
                "run: give the files of one run only"
            )
        elif (writer.run_id, writer.num_ranks) != run:
            notes.append(
                f"{witness.name}:0: the file belongs to run {writer.run_id!r} of {writer.num_ranks} ranks, not to "
                f"{run[0]!r}"
            )
        elif writer.num_ranks != num_ranks or writer.rank != rank:
            notes.append(
                f"{witness.name}:0: the header says rank {writer.rank} of {writer.num_ranks}, not rank {rank} of "
                f"{num_ranks}"
            )
        else:
            usable[rank] = witness
    return usable, notes


def _decide(case: Case, wrong_numbers: Sequence[str]) -> Verdict:
    mispaired = _mispaired(case)
    if mispaired is not None:
        key, seq, sides = mispaired
        finding = explain(case.witnesses, case.rank_states, case.ledger, case.waits, (key, seq))
        if key[0] in case.queued:
            return _queued_differently(case, key, seq, finding)
        completed = sorted(rank for side in sides for rank in side.left)
        finding.evidence.append(
            f"{key[0]} #{seq} completed on {name_ranks(completed)} although the ranks issued different collectives"
        )
        return case.verdict("corrupt", finding, evidence=[*wrong_numbers])
    hidden = case.ledger.hidden_divergence(case.queued)
    if hidden:
        return case.verdict("corrupt", evidence=[*wrong_numbers, *hidden], confidence="undecided")
    if wrong_numbers:
        return case.verdict("corrupt", evidence=wrong_numbers)
    if len(case.ranks("done")) == len(case.rank_states):
        return _clean(case)
    if case.waits.cycle and not victims(case):
        return deadlock(case, case.waits.cycle)
    if case.ranks("dead", "failed"):
        return crash(case)
    return waiting(case)


def _clean(case: Case) -> Verdict:
    """Judge a run in which all ranks are done and no difference was found.

    The verdict is `clean` if the witnesses show everything that must be equal on all ranks; otherwise `inconclusive`.
    """
    ranks = tuple(case.rank_states)
    blind = case.unknowing(ranks, COLLECTIVES | Knows.ARGUMENTS)
    if not blind and any(witness.first_event > 1 for witness in case.witnesses.values()):
        # Overwritten events are compared only by rolling hashes. The hash of a witness with layers cannot be compared
        # with the hash of a witness without layers.
        layers = case.unknowing(ranks, Knows.LAYERS)
        blind = layers if len(layers) < len(case.witnesses) else []
    if not blind:
        return case.verdict("clean")
    line = (
        f"every rank is done, but the witness of {name_ranks(blind)} does not show everything that must be equal on "
        "all ranks (operation, arguments, layer): a difference may be hidden"
    )
    return case.verdict("inconclusive", evidence=[line], confidence="undecided")


def _mispaired(case: Case) -> tuple[GroupKey, int, list[CallVariant]] | None:
    """Find a sequence number of a group under which ranks completed different collectives.

    Return (group, number, the different calls); None if there is no such number. If a rank issued a collective without
    waiting for it, and is done, the collective counts as completed on this rank.
    """
    done = set(case.ranks("done"))
    for key, seqs in sorted(case.ledger.diverged.items(), key=lambda item: item[0][0] in case.queued):
        sides = case.ledger.sides(key, min(seqs))
        completed = [side for side in sides if side.left or done & set(side.ranks)]
        if len(completed) > 1 and any(side.left for side in sides):
            return key, min(seqs), sides
    return None


def _queued_differently(case: Case, key: GroupKey, seq: int, finding: Finding) -> Verdict:
    """Judge ranks that queued different collectives on their devices under one sequence number: `inconclusive`.

    The witnesses do not show whether the devices completed these collectives. So the culprits of ``finding`` become
    suspects.
    """
    finding.evidence.append(
        f"{key[0]} #{seq} is queued with different arguments, and whether it completed is not recorded: take the "
        "stacks, or a profile of the devices, to see what is pending"
    )
    finding.suspects = tuple(sorted({*finding.suspects, *finding.culprits}))
    finding.culprits, finding.confidence = (), "undecided"
    return case.verdict("inconclusive", finding)
