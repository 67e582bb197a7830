"""Judge waits that form no cycle, if no rank died or failed. What is at the end of a chain of waits decides.

A chain of waits ends in one of these:

- a rank that works, is done, or left no usable witness
- a collective that all members have entered
- a lock that no rank holds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repro.trace.knowledge import PLAN, Knows
from repro.verdict.case import Case
from repro.verdict.evidence.graph import Node
from repro.verdict.evidence.steps import steps_of
from repro.verdict.result import Finding, Verdict, name_ranks, say
from repro.verdict.rules.deadlock import deadlock
from repro.verdict.rules.explain import NOT_ENOUGH
from repro.verdict.rules.slow import may_wait_for_device, slow
from repro.verdict.rules.stall import attended, left_by_some


def waiting(case: Case) -> Verdict:
    """Judge waits that form no cycle, by the state of the awaited ranks that do not wait themselves."""
    ends = case.waits.ends
    if ends.get("done"):
        return _waits_for_done(case)
    movers = sorted(set(ends.get("running", ())) | set(ends.get("building", ())) | set(ends.get("starting", ())))
    if movers:
        return _waits_for_movers(case, movers)
    unseen = sorted(set(ends.get("missing", ())) | set(ends.get("hidden", ())))
    if unseen:
        line = (
            f"the waits lead to {name_ranks(unseen)}, which left no usable witness: collect the witness or a stack of "
            f"{'each' if len(unseen) > 1 else 'this rank'}"
        )
        return case.verdict("inconclusive", evidence=[line], confidence="undecided")
    if case.waits.outsiders:
        return _outsider(case, case.waits.outsiders[0])
    if case.waits.left_by_some:
        return left_by_some(case)
    if case.waits.attended:
        return attended(case)
    movers = list(case.ranks("running", "building", "starting"))
    if movers:
        return _waits_for_movers(case, movers)
    own = [node for node in case.waits.nodes.values() if node.key[0] == "lock" and node.cannot_return]
    lines = [
        f"{say(sorted(node.cannot_return), 'hold')} {node.name}, but did not record that it acquired the lock"
        for node in own
    ]
    if not lines:
        lines = [f"{name_ranks(case.ranks('missing', 'hidden'))} left no usable witness, and no rank waits"]
    return case.verdict("inconclusive", evidence=lines, confidence="undecided")


def _waits_for_movers(case: Case, movers: Sequence[int]) -> Verdict:
    on_device = [rank for rank in movers if may_wait_for_device(case, rank)]
    in_locks = case.unknowing([rank for rank in movers if case.rank_states[rank].state == "running"], Knows.LOCKS)
    doubtful = sorted({*on_device, *in_locks})
    lines = []
    if on_device:
        lines.append(
            f"{name_ranks(on_device)} may be working or waiting for work queued on the device. Take the stacks to see "
            "which"
        )
    if in_locks:
        lines.append(f"{name_ranks(in_locks)} may be working or waiting for a lock. Take the stacks to see which")
    at_work = [rank for rank in movers if rank not in doubtful]
    if not at_work or in_locks:
        finding = Finding(suspects=tuple(doubtful), confidence="undecided", evidence=lines)
        return case.verdict("inconclusive", finding)
    finding = slow(case, at_work)
    if doubtful:
        finding.suspects, finding.evidence = tuple(doubtful), [*finding.evidence, *lines]
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
        busy = case.all_know(PLAN) and _ranks_with_requests(case, done, [rank for node in nodes for rank in node.ranks])
        if busy:
            line = (
                f"{name_ranks(busy)} had live requests in a scheduled step that {name_ranks(sorted(done))} never began"
            )
            verdict = replace(
                verdict,
                culprits=tuple(sorted(done)),
                suspects=(),
                confidence="certain",
                evidence=(line, *(text for text in verdict.evidence if text != NOT_ENOUGH)),
            )
    line = f"{say(sorted(done), 'are done')} and will issue no further collective"
    return replace(verdict, cycle=(), evidence=(line, *verdict.evidence))


def _ended_before(case: Case, nodes: Sequence[Node]) -> Verdict:
    """Judge collectives that every member issued, but that cannot complete because the process of a member ended.

    The verdict is `deadlock`, with the ranks that ended as suspects; `inconclusive` before the quiet window has passed.
    """
    done = case.waits.ends["done"]
    verdict = deadlock(case, nodes[:1])
    lines = [f"{name_ranks(sorted(node.cannot_return & done))} ended before {node.name} completed" for node in nodes]
    if verdict.verdict == "deadlock":
        verdict = replace(verdict, culprits=(), suspects=tuple(sorted(done)), confidence="undecided")
    return replace(verdict, cycle=(), evidence=(*lines, *verdict.evidence))


def _ranks_with_requests(case: Case, done: set[int], waiting: Sequence[int]) -> list[int]:
    """Find the waiting ranks that have requests in a step that no rank of ``done`` has begun.

    Such a rank shows that the ranks of ``done`` stopped too early. It counts only if it declared a schedule for this
    step.
    """
    last = {rank: steps_of(case.witnesses[rank], 1) for rank in {*done, *waiting} if rank in case.witnesses}
    begun = (case.witnesses[rank].last for rank in done if rank in case.witnesses)
    # the last event has the number of the step, even if the event that began the step is overwritten
    began = max((event.step for event in begun if event is not None), default=-1)
    newest = {rank: steps[-1] for rank, steps in last.items() if rank in waiting and steps}
    return sorted(rank for rank, step in newest.items() if step.plan and step.live > 0 and step.number > began)


def _outsider(case: Case, node: Node) -> Verdict:
    """Judge a wait for a lock that no rank holds.

    The verdict is `slow` if another process holds the lock, and `deadlock` if no process holds it and the quiet window
    has passed; otherwise it is `inconclusive`. It is also `inconclusive` if a rank has no complete witness, because
    this rank possibly holds the lock.
    """
    pid = node.outside
    unseen = case.ranks("missing", "hidden")
    if unseen:
        line = f"no rank with a complete witness holds {node.name}, but {say(unseen, 'have')} none"
        return case.verdict("inconclusive", evidence=[line], confidence="undecided")
    if pid == 0 and case.quiet:
        finding = Finding("lock")
        finding.evidence.append(f"no process holds {node.name} any more, for which {say(node.ranks, 'wait')}")
        if node.named > 0:
            finding.evidence.append(f"when they began to wait, process {node.named} held it")
        return case.verdict("deadlock", finding)
    if pid is not None and pid > 0:
        finding = Finding("lock", confidence="likely" if node.named == pid else "certain")
        finding.evidence.append(f"process {pid}, which is not a rank, holds {node.name}")
        return case.verdict("slow", finding)
    line = f"the holder of {node.name} is unknown: look for it on the host"
    return case.verdict("inconclusive", evidence=[line], confidence="undecided")
