"""Judge log lines in which TORCH_DISTRIBUTED_DEBUG=DETAIL, or NCCL's network code, reports different arguments."""

from __future__ import annotations

from collections import Counter

from repro.trace.foreign.records import Call
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.members import groups_of
from repro.verdict.partial.dumps.sides import different_arguments
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import arguments, ranks_of, verb


def judge_mismatches(job: JobRecords) -> Diagnosis | None:
    """Judge reports of TORCH_DISTRIBUTED_DEBUG=DETAIL, which compares the arguments before each collective.

    Each rank reports the first rank that differs from itself. The reported rank can be right, so there is no culprit.
    The ranks with the rarest arguments are suspects, if they are fewer than the ranks with the most frequent arguments.
    """
    if not job.mismatches:
        return None
    calls: dict[int, Call] = {}
    for row in job.mismatches:
        calls.setdefault(row.rank, row.call)
        if row.other is not None and row.other_call is not None:
            calls.setdefault(row.other, row.other_call)
    sides: dict[tuple[object, ...], list[int]] = {}
    for rank, call in sorted(calls.items()):
        sides.setdefault((call.seq, *call.arguments), []).append(rank)
    ordered = sorted(sides.values(), key=len)
    few = tuple(ordered[0]) if len(ordered) > 1 and len(ordered[0]) < len(ordered[-1]) else ()
    evidence = [
        f"{ranks_of(ranks).capitalize()}: {arguments(calls[ranks[0]])}, sequence number "
        f"{calls[ranks[0]].seq} ({calls[ranks[0]].source})"
        for ranks in ordered
    ]
    counted = Counter(row.other for row in job.mismatches if row.other is not None)
    if counted:
        evidence.append(
            "Each report names its own rank and the first rank that differs from it. A rank that is named often may "
            "still be right."
        )
    if few:
        evidence.append(
            f"{ranks_of(few).capitalize()} {verb(few, 'differs', 'differ')} from the other ranks, which is "
            "not enough to name a culprit."
        )
    ops = {calls[ranks[0]].op for ranks in ordered}
    numbers = {calls[ranks[0]].seq for ranks in ordered}
    return Diagnosis(
        "crash", "mismatch" if len(ops) > 1 or len(numbers) > 1 else "sizes", (), few, "likely",
        (f"The ranks entered one collective with different {'operations' if len(ops) > 1 else 'shapes (sizes)'}. "
         "TORCH_DISTRIBUTED_DEBUG=DETAIL refused the collective before it could hang.",),
        tuple(evidence), ("The reports are of different collectives: compare their sequence numbers.",),
        ("why the ranks built different graphs: print on each rank its batch and the parameters (buckets) that take "
         "part, frozen and unused ones included; and take its stack",),
    )  # fmt: skip


def judge_message_sizes(job: JobRecords) -> Diagnosis | None:
    """Judge a line in which NCCL reports a message of an unexpected size: two ranks called a collective differently.

    A device or network that makes no progress does not cause such a line. The diagnosis has no culprit, because the
    line does not show which of the two ranks is wrong. Return None if the logs have no such line. Also return None if a
    memory error, a device error or SIGKILL ended a process, or if dumps show the different arguments, because then
    other rules prove more.
    """
    rows = [note for note in job.notes if note.kind == "sizes"]
    ended = [record for record in job.failures if record.kind in ("memory", "device", "killed")]
    if not rows or ended or different_arguments(job, groups_of(job.recorders)) is not None:
        return None
    failed = any(record.kind == "exception" for record in job.failures)
    waits = job.timeouts or any(record.pending for dump in job.recorders.values() for record in dump.groups)
    verdict = "crash" if failed else "deadlock" if waits else "inconclusive"
    decided = verdict != "inconclusive"
    lines = dict.fromkeys(f"{note.process}: {note.text} ({note.source})" for note in rows)
    return Diagnosis(
        verdict, "sizes" if decided else "", (), (), "likely" if decided else "undecided",
        ("Two ranks passed different sizes to one collective, or entered different collectives: NCCL's network "
         "received a message of another size than it expected. No file shows which side is right.",),
        tuple(list(lines)[:6]), ("The message is from an earlier run, or from another communicator.",),
        (COLLECT["recorder"], "the same run with TORCH_DISTRIBUTED_DEBUG=DETAIL, which compares the arguments before "
         "each collective"),
    )  # fmt: skip
