"""What the waits end in, where there is no cycle and no rank has died: a rank that works, is done, or was not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repro.verdict.case import Case
from repro.verdict.deadlock import deadlock
from repro.verdict.graph import Node
from repro.verdict.result import Finding, Verdict, name_ranks, say
from repro.verdict.schedule import steps_of
from repro.verdict.slow import may_wait_for_device, slow
from repro.verdict.stall import attended, left_by_some


def waiting(case: Case) -> Verdict:
    """Judge by what the waits end in."""
    ends = case.waits.ends
    if ends.get("done"):
        return _waits_for_done(case)
    movers = sorted(set(ends.get("running", ())) | set(ends.get("building", ())) | set(ends.get("starting", ())))
    if movers:
        return _waits_for_movers(case, movers)
    unseen = sorted(set(ends.get("missing", ())) | set(ends.get("hidden", ())))
    if unseen:
        line = f"the waits end in {name_ranks(unseen)}, without a usable witness: collect it, or a stack"
        return case.verdict("inconclusive", evidence=[line], confidence="undecided")
    if case.waits.outsiders:
        return _outsider(case, case.waits.outsiders[0])
    if case.waits.left_by_some:
        return left_by_some(case)
    if case.waits.attended:
        return attended(case)
    movers = list(case.ranks("running", "building", "starting"))
    if movers:
        return case.verdict("slow", slow(case, movers))
    own = [node for node in case.waits.nodes.values() if node.key[0] == "lock" and node.cannot_return]
    lines = [
        f"{node.name} is with {name_ranks(sorted(node.cannot_return))}, which has not recorded that it got it"
        for node in own
    ]
    if not lines:
        lines = [f"{name_ranks(case.ranks('missing', 'hidden'))} left no usable witness, and no rank waits"]
    return case.verdict("inconclusive", evidence=lines, confidence="undecided")


def _waits_for_movers(case: Case, movers: Sequence[int]) -> Verdict:
    on_device = [rank for rank in movers if may_wait_for_device(case, rank)]
    line = f"{name_ranks(on_device)} may work, or wait until the device has done what is queued: the stacks show which"
    if on_device == movers:
        finding = Finding(suspects=tuple(on_device), confidence="undecided", evidence=[line])
        return case.verdict("inconclusive", finding)
    finding = slow(case, [rank for rank in movers if rank not in on_device])
    if on_device:
        finding.suspects, finding.evidence = tuple(on_device), [*finding.evidence, line]
    return case.verdict("slow", finding)


def _waits_for_done(case: Case) -> Verdict:
    done = case.waits.ends["done"]
    nodes = [node for node in case.waits.nodes.values() if node.waits_for & done]
    if not nodes:
        return _ended_before(case, [node for node in case.waits.nodes.values() if node.cannot_return & done])
    verdict = deadlock(case, nodes[:1])
    if verdict.verdict == "deadlock" and (locks := [node for node in nodes if node.key[0] == "lock"]):
        holders = sorted(rank for node in locks for rank in node.waits_for & done)
        line = f"{say(holders, 'are done')} and still {'hold' if len(holders) > 1 else 'holds'} {locks[0].name}"
        return replace(
            verdict,
            cause="lock",
            culprits=tuple(holders),
            suspects=(),
            confidence="certain",
            cycle=(),
            evidence=(line,),
        )
    if verdict.verdict == "deadlock" and not verdict.cause:
        verdict = replace(verdict, cause="skipped", confidence="undecided")
    if verdict.cause == "skipped" and not verdict.culprits:
        busy = _busy_without(case, done, [rank for node in nodes for rank in node.ranks])
        if busy:
            line = f"in a scheduled step that {name_ranks(sorted(done))} never began, {name_ranks(busy)} had requests"
            verdict = replace(
                verdict,
                culprits=tuple(sorted(done)),
                suspects=(),
                confidence="certain",
                evidence=(line, *verdict.evidence),
            )
    line = f"{say(sorted(done), 'are done')} and will not come"
    return replace(verdict, cycle=(), evidence=(line, *verdict.evidence))


def _ended_before(case: Case, nodes: Sequence[Node]) -> Verdict:
    """Every member has issued the collective, and the process of one that was done ended before it completed."""
    done = case.waits.ends["done"]
    verdict = deadlock(case, nodes[:1])
    lines = [f"{name_ranks(sorted(node.cannot_return & done))} ended before {node.name} completed" for node in nodes]
    if verdict.verdict == "deadlock":
        verdict = replace(verdict, culprits=(), suspects=tuple(sorted(done)), confidence="undecided")
    return replace(verdict, cycle=(), evidence=(*lines, *verdict.evidence))


def _busy_without(case: Case, done: set[int], waiting: Sequence[int]) -> list[int]:
    """Find the ranks that wait by their declared schedule, with live requests, in a step that no done rank began."""
    last = {rank: steps_of(case.witnesses[rank], 1) for rank in {*done, *waiting} if rank in case.witnesses}
    begun = (case.witnesses[rank].last for rank in done if rank in case.witnesses)
    began = max((event.step for event in begun if event is not None), default=-1)  # also where its ring lost the step
    newest = {rank: steps[-1] for rank, steps in last.items() if rank in waiting and steps}
    return sorted(rank for rank, step in newest.items() if step.plan and step.live > 0 and step.number > began)


def _outsider(case: Case, node: Node) -> Verdict:
    """Judge a wait for a lock whose holder is no rank."""
    pid = node.outside
    unseen = case.ranks("missing", "hidden")
    if unseen:
        line = f"no rank that was seen holds {node.name}, but {say(unseen, 'have')} no whole witness"
        return case.verdict("inconclusive", evidence=[line], confidence="undecided")
    if pid == 0 and case.quiet:
        finding = Finding("lock")
        finding.evidence.append(f"nobody holds {node.name} any more, for which {say(node.ranks, 'wait')}")
        if node.named > 0:
            finding.evidence.append(f"when they began to wait, process {node.named} held it")
        return case.verdict("deadlock", finding)
    if pid is not None and pid > 0:
        finding = Finding("lock", confidence="likely" if node.named == pid else "certain")
        finding.evidence.append(f"process {pid}, which is no rank, holds {node.name}")
        return case.verdict("slow", finding)
    line = f"the holder of {node.name} is not known: look for it on the host"
    return case.verdict("inconclusive", evidence=[line], confidence="undecided")
