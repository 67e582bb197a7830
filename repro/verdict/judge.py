"""The judge: positions, graph and explanation to one verdict.

The order of the questions is the rule: is everybody done, did ranks pair different collectives, is there a cycle,
did somebody die, does somebody wait for a rank that will never come, for one that still runs, for one that left no
witness, or does everybody stand in one collective that does not end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from repro.layout import Identity
from repro.verdict.case import Case
from repro.verdict.crash import crash, victims
from repro.verdict.explain import explain
from repro.verdict.facts import Facts
from repro.verdict.graph import Node, wait_graph
from repro.verdict.ledger import Ledger, Side, widest
from repro.verdict.position import GroupKey, clocks, locate
from repro.verdict.result import Finding, Position, Verdict, list_ranks, name_ranks
from repro.verdict.schedule import steps_of
from repro.witness import Witness

_BUSY = 0.02
"""Processors in use that count as work; a process that only sleeps uses fewer."""

_STARVED, _STARVED_WINDOWS = 0.1, 10
"""Lack of a processor that makes a collective take longer than it should, and how much longer it is then given."""

NOTHING_SEEN = Facts()


def judge(
    witnesses: Mapping[int, Witness],
    facts: Facts = NOTHING_SEEN,
    *,
    num_ranks: int,
    now_ns: int | Mapping[int, int],
    quiet_window_s: float,
    home: Identity | None = None,
    wrong_numbers: Sequence[str] = (),
    queued: Collection[str] = (),
) -> Verdict:
    """Judge what the witnesses and the systems of their hosts prove.

    facts          what the systems say; a rank whose process was not seen is taken to live
    now_ns         the monotonic clock when the witnesses were read: of the host of ``home``, or by rank
    quiet_window_s for how long no rank must have recorded an event before a hang is certain
    home           who read the clock; not given, the lowest rank
    wrong_numbers  one line for each result that differs from the reference: a clean run becomes corrupt
    queued         groups in which the record of a collective ends when it is queued, as on NCCL
    """
    usable, notes = _one_run(witnesses, num_ranks)
    nows, clock_notes = clocks(usable, now_ns, home)
    standings = {
        rank: locate(rank, usable.get(rank), nows.get(rank, 0), facts.alive.get(rank), facts.excused.get(rank, ""))
        for rank in range(num_ranks)
    }
    notes += clock_notes + [problem for witness in usable.values() for problem in witness.problems]
    ledger = Ledger(usable)
    waits = wait_graph(standings, ledger, facts.lock_holders)
    quiet_ns = [max(0, nows[rank] - witness.last_event_ns()) for rank, witness in usable.items() if witness.last]
    quiet_s = min(quiet_ns, default=0) / 1e9
    case = Case(
        usable,
        standings,
        ledger,
        waits,
        quiet_s,
        quiet_window_s,
        notes,
        facts,
        queued,
        now_s=(now_ns.get(min(now_ns, default=0), 0) if isinstance(now_ns, Mapping) else now_ns) / 1e9,
    )
    return _decide(case, wrong_numbers)


def _one_run(witnesses: Mapping[int, Witness], num_ranks: int) -> tuple[dict[int, Witness], list[str]]:
    """The witnesses of one run, and a line for each that is not used."""
    runs = Counter((witness.who.run_id, witness.who.num_ranks) for witness in witnesses.values())
    notes: list[str] = []
    usable: dict[int, Witness] = {}
    most = runs.most_common(2)
    tied = len(most) == 2 and most[0][1] == most[1][1]
    run = most[0][0] if most else ("", num_ranks)
    for rank, witness in sorted(witnesses.items()):
        who = witness.who
        if tied:
            notes.append(f"{witness.name}:0: run {who.run_id!r}: the files are of two runs, as many of each")
        elif (who.run_id, who.num_ranks) != run:
            notes.append(f"{witness.name}:0: of run {who.run_id!r} with {who.num_ranks} ranks, not of {run[0]!r}")
        elif who.num_ranks != num_ranks or who.rank != rank:
            notes.append(
                f"{witness.name}:0: rank {who.rank} of {who.num_ranks} was given as rank {rank} of {num_ranks}"
            )
        else:
            usable[rank] = witness
    return usable, notes


def _decide(case: Case, wrong_numbers: Sequence[str]) -> Verdict:
    mispaired = _mispaired(case)
    if mispaired is not None:
        key, seq, _ = mispaired
        finding = explain(case.witnesses, case.standings, case.ledger, case.waits, (key, seq))
        if key[0] in case.queued:
            return _queued_differently(case, key, seq, finding)
        finding.evidence.append(f"{key[0]} #{seq} completed on both sides although they differ")
        return case.verdict("corrupt", finding, evidence=[*wrong_numbers])
    hidden = case.ledger.hidden_divergence(case.queued)
    if hidden:
        return case.verdict("corrupt", evidence=[*wrong_numbers, *hidden], confidence="undecided")
    if wrong_numbers:
        return case.verdict("corrupt", evidence=wrong_numbers)
    if len(case.ranks("done")) == len(case.standings):
        return case.verdict("clean")
    if case.waits.cycle and not victims(case):
        return _deadlock(case, case.waits.cycle)
    if case.ranks("dead", "failed"):
        return crash(case)
    return _waiting(case)


def _mispaired(case: Case) -> tuple[GroupKey, int, list[Side]] | None:
    """A collective that ranks completed although they had issued different ones under its number."""
    for key, seqs in sorted(case.ledger.diverged.items(), key=lambda item: item[0][0] in case.queued):
        for seq in sorted(seqs)[:1]:
            sides = case.ledger.sides(key, seq)
            if sum(bool(side.left) for side in sides) > 1:
                return key, seq, sides
    return None


def _queued_differently(case: Case, key: GroupKey, seq: int, finding: Finding) -> Verdict:
    """Nothing says whether it completed, with wrong numbers, or hangs on the devices."""
    finding.evidence.append(
        f"{key[0]} #{seq} is queued on both sides although they differ; whether it completed is not recorded: look at "
        "what the devices have pending"
    )
    finding.suspects = tuple(sorted({*finding.suspects, *finding.culprits}))
    finding.culprits, finding.confidence = (), "undecided"
    return case.verdict("inconclusive", finding)


def _deadlock(case: Case, cycle: Sequence[Node]) -> Verdict:
    """There is a cycle, or a rank that is waited for is done: wait for quiet, then say who did it."""
    links = _links(cycle)
    told = [
        f"{name_ranks(link['ranks'])} in {link['waits_in']} wait for {list_ranks(link['for'])}"
        f" ({case.standings[link['ranks'][0]].position.line})"
        for link in links
    ]
    if not case.quiet:
        told.append(f"quiet for {case.quiet_s:.3f} s only, {case.quiet_window_s:g} s are needed: look again")
        return case.verdict("inconclusive", cycle=links, evidence=told, confidence="undecided")
    finding = explain(case.witnesses, case.standings, case.ledger, case.waits)
    unseen = case.ranks("missing", "hidden")
    if unseen and finding.culprits:
        finding.evidence.append(f"{name_ranks(unseen)} left no usable witness and may have done the same")
        finding.confidence = "likely"
    return case.verdict("deadlock", finding, cycle=links, evidence=told)


def _links(cycle: Sequence[Node]) -> tuple[dict[str, Any], ...]:
    links = []
    for i, node in enumerate(cycle):
        following = cycle[(i + 1) % len(cycle)]
        lacked = sorted(node.lacks & set(following.ranks)) or sorted(node.lacks)
        links.append({"ranks": sorted(node.ranks), "waits_in": node.name, "for": lacked})
    return tuple(links)


def _waiting(case: Case) -> Verdict:
    """No cycle and nobody dead: judge by what the waits end in."""
    ends = case.waits.ends
    if ends.get("done"):
        return _waits_for_done(case)
    movers = sorted(set(ends.get("running", ())) | set(ends.get("building", ())) | set(ends.get("starting", ())))
    if movers and all(_may_wait_for_device(case, rank) for rank in movers):
        told = [
            f"{name_ranks(movers)} run, or wait on their devices for what they have queued, which is not recorded: the "
            "stacks tell"
        ]
        return case.verdict("inconclusive", Finding(suspects=tuple(movers), confidence="undecided", evidence=told))
    if movers:
        return case.verdict("slow", _slow(case, movers))
    unseen = sorted(set(ends.get("missing", ())) | set(ends.get("hidden", ())))
    if unseen:
        told = [f"the waits end in {name_ranks(unseen)}, without a usable witness: collect it, or a stack"]
        return case.verdict("inconclusive", evidence=told, confidence="undecided")
    if case.waits.outsiders:
        return _outsider(case, case.waits.outsiders[0])
    if case.waits.attended:
        return _attended(case)
    movers = list(case.ranks("running", "building", "starting"))
    if movers:
        return case.verdict("slow", _slow(case, movers))
    own = [node for node in case.waits.nodes.values() if node.key[0] == "lock" and node.lost]
    if own:
        told = [
            f"{node.name} is with {name_ranks(sorted(node.lost))}, which has not said that it got it" for node in own
        ]
        return case.verdict("inconclusive", evidence=told, confidence="undecided")
    told = [f"{name_ranks(case.ranks('missing', 'hidden'))} left no usable witness, and nobody waits"]
    return case.verdict("inconclusive", evidence=told, confidence="undecided")


def _may_wait_for_device(case: Case, rank: int) -> bool:
    """Whether a rank outside any collective has queued some and gives no sign of work of its own."""
    standing = case.standings[rank]
    has_queued = any(key[0] in case.queued and issued for key, issued in standing.issued.items())
    return has_queued and standing.state == "running" and standing.beat_s is None and not standing.position.detail


def _slow(case: Case, movers: Sequence[int]) -> Finding:
    """Who is waited for and what shows that they work; ``likely`` where nothing does."""
    finding = Finding("", tuple(movers))
    signs = {rank: _signs_of_life(case, rank) for rank in movers}
    for rank in movers[:8]:
        at: Position = case.standings[rank].position
        what = ", ".join([at.detail or "outside any collective", *signs[rank]])
        finding.evidence.append(f"rank {rank} {at.state} for {at.since_s:.1f} s: {what}")
    silent = [rank for rank, told in signs.items() if rank in case.facts.cores and not told]
    starved = [rank for rank in silent if case.facts.starved.get(rank, 0.0) >= _STARVED]
    if starved:
        finding.confidence = "likely"
        finding.evidence.append(f"{name_ranks(starved)} lacked a processor: on so busy a machine work hardly shows")
    elif silent == list(movers):
        finding.confidence = "likely"
        finding.evidence.append(
            f"{name_ranks(silent)} used no processor and gave no sign of life: asleep, or waiting for something that "
            "is not recorded; the stack tells"
        )
    return _tell_waits(case, finding)


def _signs_of_life(case: Case, rank: int) -> list[str]:
    """What shows that a rank outside any collective works on."""
    standing, cores = case.standings[rank], case.facts.cores.get(rank, 0.0)
    signs = []
    if standing.beat_s is not None:
        signs.append(f"heartbeat {standing.beat_s:.1f} s ago" + (f" ({standing.beat})" if standing.beat else ""))
    if cores >= _BUSY:
        signs.append(f"keeps {cores:.2f} processors busy")
    return signs


def _tell_waits(case: Case, finding: Finding) -> Finding:
    """Who waits, and for which lock of whom."""
    waiting = case.ranks("blocked", "locked")
    if waiting:
        finding.evidence.append(f"{name_ranks(waiting)} wait for it")
    for node in case.waits.nodes.values():
        holders = sorted(node.lacks)
        if node.key[0] == "lock" and holders:
            finding.evidence.append(
                f"{node.name}, for which {name_ranks(node.ranks)} wait, is with {name_ranks(holders)}"
            )
    return finding


def _waits_for_done(case: Case) -> Verdict:
    done = case.waits.ends["done"]
    nodes = [node for node in case.waits.nodes.values() if node.lacks & done]
    verdict = _deadlock(case, nodes[:1])
    if verdict.verdict == "deadlock" and (locks := [node for node in nodes if node.key[0] == "lock"]):
        holders = sorted(rank for node in locks for rank in node.lacks & done)
        told = f"{name_ranks(holders)} said done and still holds {locks[0].name}"
        return replace(
            verdict,
            cause="lock",
            culprits=tuple(holders),
            suspects=(),
            confidence="certain",
            cycle=(),
            evidence=(told,),
        )
    if verdict.verdict == "deadlock" and not verdict.cause:
        verdict = replace(verdict, cause="skipped", confidence="undecided")
    if verdict.cause == "skipped" and not verdict.culprits:
        busy = _busy_without(case, done, [rank for node in nodes for rank in node.ranks])
        if busy:
            told = f"in a scheduled step that {name_ranks(sorted(done))} never began, {name_ranks(busy)} had requests"
            verdict = replace(
                verdict,
                culprits=tuple(sorted(done)),
                suspects=(),
                confidence="certain",
                evidence=(told, *verdict.evidence),
            )
    told = f"{name_ranks(sorted(done))} said done and will not come"
    return replace(verdict, cycle=(), evidence=(told, *verdict.evidence))


def _busy_without(case: Case, done: set[int], waiting: Sequence[int]) -> list[int]:
    """Ranks that wait by their declared schedule, with live requests, in a step that no done rank began."""
    last = {rank: steps_of(case.witnesses[rank], 1) for rank in {*done, *waiting} if rank in case.witnesses}
    begun = (case.witnesses[rank].last for rank in done if rank in case.witnesses)
    began = max((event.step for event in begun if event is not None), default=-1)  # also where its ring lost the step
    newest = {rank: steps[-1] for rank, steps in last.items() if rank in waiting and steps}
    return sorted(rank for rank, step in newest.items() if step.plan and step.live > 0 and step.number > began)


def _outsider(case: Case, node: Node) -> Verdict:
    """A lock whose holder is no rank."""
    pid = node.outside
    unseen = case.ranks("missing", "hidden")
    if unseen:
        told = [f"{node.name} is held by none of the ranks seen, but {name_ranks(unseen)} left no whole witness"]
        return case.verdict("inconclusive", evidence=told, confidence="undecided")
    if pid == 0 and case.quiet:
        finding = Finding("lock")
        finding.evidence.append(f"nobody holds {node.name} any more, for which {name_ranks(node.ranks)} still wait")
        if node.named > 0:
            finding.evidence.append(f"when they began to wait it was with process {node.named}")
        return case.verdict("deadlock", finding)
    if pid is not None and pid > 0:
        finding = Finding("lock")
        finding.evidence.append(f"{node.name} is held by process {pid}, which is no rank")
        return case.verdict("slow", finding)
    told = [f"who holds {node.name} is not known: look for its holder on the host"]
    return case.verdict("inconclusive", evidence=told, confidence="undecided")


def _attended(case: Case) -> Verdict:
    """Everybody is in the collective that all waits end in."""
    node = case.waits.attended[0]
    unseen = [rank for rank in _members(node) if not case.standings[rank].seen]
    if unseen:
        told = [f"all are in {node.name}, but {name_ranks(unseen)} left no whole witness to compare arguments with"]
        return case.verdict("inconclusive", evidence=told, confidence="undecided")
    starved = max((case.facts.starved.get(rank, 0.0) for rank in _members(node)), default=0.0)
    if starved >= _STARVED and case.quiet_s < _STARVED_WINDOWS * case.quiet_window_s:
        told = [
            f"all are in {node.name} since {case.quiet_s:.1f} s, but ranks lacked a processor for {starved:.0%} of the "
            f"time: on so busy a machine it takes {_STARVED_WINDOWS} quiet windows to be sure"
        ]
        return case.verdict("inconclusive", evidence=told, confidence="undecided")
    if case.quiet:
        told = [f"all members are in {node.name} and nobody is absent: a device or network stall"]
        if node.key in case.waits.nodes and _differs_in_place(case, node):
            told.append("they do not issue it for the same layer and step")
        return case.verdict("stall", evidence=told)
    told = [f"still moving: the last event is {case.quiet_s:.3f} s old, {case.quiet_window_s:g} s of quiet are needed"]
    return case.verdict("inconclusive", evidence=told, confidence="undecided")


def _members(node: Node) -> tuple[int, ...]:
    members = node.key[1][1]
    assert isinstance(members, tuple)
    return members


def _differs_in_place(case: Case, node: Node) -> bool:
    group, seq = node.key[1], node.key[2]
    assert isinstance(group[1], tuple)
    key = (group[0], group[1])
    return seq in case.ledger.diverged.get(key, ()) and widest(case.ledger.sides(key, seq)) == "place"
