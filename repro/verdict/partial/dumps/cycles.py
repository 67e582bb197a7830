"""Judge waits that form a cycle: each rank of the cycle waits in an operation that the next rank has not queued."""

from __future__ import annotations

from collections.abc import Sequence

from repro.trace.foreign.operations import TRANSFERS
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.habits import left_rhythm
from repro.verdict.partial.dumps.waits import Wait, cycle_of
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import call_in, program_frames, ranks_of, verb


def judge_cycle(job: JobRecords, waits: Sequence[Wait]) -> Diagnosis | None:
    chain = cycle_of(waits)
    if not chain:
        return None
    ranks = sorted({wait.rank for wait in chain})
    links = [
        f"rank {wait.rank} waits in {call_in(wait.call, wait.group)} for {ranks_of(wait.missing)}" for wait in chain
    ]
    evidence = [
        f"Rank {wait.rank}: {call_in(wait.call, wait.group)} is queued and not done"
        + (f", from {place}" if (place := program_frames(wait.call.frames)) else "") + f" ({wait.at}); "
        + f"{ranks_of(wait.missing)} {verb(wait.missing, 'has', 'have')} not queued {_counterpart(wait)}"
        for wait in chain
    ]  # fmt: skip
    evidence += [
        f"Rank {rank}'s stack: {' < '.join(frames)} ({stack.source})"
        for rank in ranks
        for stack in job.main_stacks().get(rank, [])[-1:]
        if (frames := program_frames(stack.frames, 3).split(" < ")) != [""]
    ]
    transfers = all(wait.call.is_transfer for wait in chain)
    unseen = sorted({rank for wait in waits for rank in wait.unseen})
    extra = None if transfers else left_rhythm(job, [(wait.rank, wait.call) for wait in waits])
    culprits: tuple[int, ...] = ()
    suspects: tuple[int, ...] = ()
    cause, confidence = "order", "likely"
    if extra is not None:
        evidence.append(extra.sentence)
        cause = extra.kind
        culprits, suspects = ((extra.rank,), ()) if extra.convincing else ((), (extra.rank,))
    stood_out = _changed_order(job, ranks) if transfers else []
    if stood_out:
        suspects = tuple(stood_out)
        evidence.append(
            f"{ranks_of(stood_out).capitalize()} changed {verb(stood_out, 'its', 'their')} order of sends and "
            "receives. An interleaved pipeline schedule may do so on purpose, so "
            f"{verb(stood_out, 'this rank is', 'these ranks are')} only suspected."
        )
    summary = [f"{ranks_of(ranks).capitalize()} wait for each other in a cycle: " + "; ".join(links) + "."]
    if transfers:
        summary.append(
            "Each rank waits in a receive, and the matching send was never queued."
            if all(w.call.op == "recv" for w in chain)
            else "The sends and receives do not match."
        )
    collect = [
        "the order in which each rank issues these operations, from the code; batched transfers (batch_isend_irecv) "
        "need no order"
        if transfers
        else COLLECT["stacks"]
    ]
    if unseen:
        collect.append(f"the dumps of {ranks_of(unseen)}, which are missing")
    return Diagnosis(
        "deadlock", cause, culprits, suspects, confidence, tuple(summary), tuple(evidence),
        ("A later dump in which one of these operations is done.",), tuple(collect),
    )  # fmt: skip


def _counterpart(wait: Wait) -> str:
    if wait.call.is_transfer:
        return f"the {'send' if wait.call.op == 'recv' else 'receive'} that this transfer needs"
    return "it"


def _changed_order(job: JobRecords, ranks: Sequence[int]) -> list[int]:
    """Return the ranks whose last send or receive breaks the repeating pattern of their sends and receives.

    Returns [] if all ranks break their pattern, or if a rank has no pattern.
    """
    changed = []
    for rank in ranks:
        ops = [op for record in job.recorders[rank].groups for op in record.calls.ops() if op in TRANSFERS]
        past, last = ops[:-1], ops[-1:]
        if len(past) < 4:
            return []
        for period in range(1, len(past) // 2 + 1):
            if all(past[i] == past[i - period] for i in range(period, len(past))):
                if last[0] != past[len(past) - period]:
                    changed.append(rank)
                break
        else:
            return []
    return changed if len(changed) < len(ranks) else []
