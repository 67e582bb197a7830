"""Find a rank whose host process or device makes no more progress, by the counters in Flight Recorder dumps.

In each group, the recorder counts the operations that the rank has queued, and those that completed. These counters
are compared between the members of the group. If a rank has completed fewer operations than the others, although it
has queued more than it completed, its device makes no more progress. If a rank has queued fewer operations than the
others and waits for nothing, its host process makes no more progress. One such group is not enough to name a rank: the
counters must show the same in several groups (CONVINCING_GROUPS). The counters of gloo are not used, because they can
also differ between members of a healthy group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from repro.trace.foreign.records import Group, GroupRecord, RecorderDump
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.moments import advanced
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import WORKING, ranks_of, verb

CONVINCING_GROUPS = 2
"""A rank is named as the culprit only if it is behind the others in at least this many groups."""


def judge_stopped(job: JobRecords, groups: Mapping[Group, Mapping[int, GroupRecord]]) -> Diagnosis | None:
    recorders = job.recorders
    device: Counter[int] = Counter()
    host: Counter[int] = Counter()
    reasons: dict[int, list[str]] = {}
    backend = next((dump.backend for dump in recorders.values() if dump.backend), "")
    if backend == "gloo":  # gloo uses no device, and its counters may differ in a healthy group
        return None
    for group, records in groups.items():
        counted = {
            rank: record for rank, record in records.items()
            if record.enqueued is not None and record.completed is not None
        }  # fmt: skip
        if len(counted) < 2 or any(record.calls.has_transfers for record in records.values()):
            continue
        completed = max(record.completed or 0 for record in counted.values())
        enqueued = max(record.enqueued or 0 for record in counted.values())
        shown = next((r.group for r in records.values() if r.group.description), group)
        for rank, record in counted.items():
            if (record.completed or 0) < completed and (record.enqueued or 0) > (record.completed or 0):
                device[rank] += 1
                reasons.setdefault(rank, []).append(
                    f"in {shown} it completed #{record.completed} and the other members #{completed}, although it has "
                    f"queued up to #{record.enqueued}"
                )
            elif (record.enqueued or 0) < enqueued and not _waits(recorders[rank]):
                host[rank] += 1
                reasons.setdefault(rank, []).append(
                    f"in {shown} it queued up to #{record.enqueued} and the other members up to #{enqueued}, and it "
                    "waits for nothing"
                )
    for kind, count in (("device", device), ("host", host)):
        culprits = tuple(sorted(rank for rank, groups_behind in count.items() if groups_behind >= CONVINCING_GROUPS))
        if not culprits or len(culprits) * 2 > len(recorders):
            continue  # most ranks are behind, so the dumps were taken at different moments
        if any(rank in job.earlier and advanced(job.earlier[rank], recorders[rank]) for rank in culprits):
            continue  # the rank moved between its two dumps
        if kind == "host" and not _stands_still(job, culprits):
            continue  # the stack shows that the host works or waits; later rules judge this
        return _stopped_diagnosis(kind, culprits, reasons, recorders)
    return None


def _stands_still(job: JobRecords, ranks: tuple[int, ...]) -> bool:
    """Whether the stacks agree with the conclusion that the host programs of these ranks stopped for no known reason.

    Return False if the last stack of one of them shows work (such as a build or a load), a wait for a lock, or a
    collective. This explains why the rank queues nothing, so later rules judge it. Ranks without a stack are ignored.
    """
    stacks = [rows[-1] for rank, rows in job.main_stacks().items() if rank in ranks]
    return not any(stack.activity in (*WORKING, "lock", "collective") for stack in stacks)


def _waits(dump: RecorderDump) -> bool:
    return any(record.pending or (record.enqueued or 0) > (record.completed or 0) for record in dump.groups)


def _stopped_diagnosis(
    kind: str, culprits: tuple[int, ...], reasons: Mapping[int, Sequence[str]], recorders: Mapping[int, RecorderDump]
) -> Diagnosis:
    waiting = sorted(set(recorders) - set(culprits))
    if kind == "device":
        summary = (
            f"The {verb(culprits, 'device', 'devices')} of {ranks_of(culprits)} stopped: the host "
            "queued work that the device did not complete."
        )
        collect = (
            f"the kernel log on the hosts of {ranks_of(culprits)}: dmesg -T | grep -iE 'xid|nvrm'",
            COLLECT["stacks"],
        )
    else:
        summary = (
            f"The {verb(culprits, 'host process', 'host processes')} of {ranks_of(culprits)} stopped: "
            f"{verb(culprits, 'it queues', 'they queue')} nothing more, and "
            f"{verb(culprits, 'waits', 'wait')} for nothing."
        )
        collect = (
            f"stacks of {ranks_of(culprits)}: py-spy dump --native --nonblocking --pid PID (a lock, "
            "Python's GIL, a debugger, a data loader)",
            COLLECT["stacks"],
        )
    evidence = [
        f"Rank {rank}: {reason} ({recorders[rank].source})" for rank in culprits for reason in list(reasons[rank])[:2]
    ]
    return Diagnosis(
        "stall", kind, culprits, (), "likely",
        (summary, f"{ranks_of(waiting).capitalize()} {verb(waiting, 'waits', 'wait')} for "
        f"{verb(culprits, 'it', 'them')}, directly or through others."),
        tuple(evidence),
        ("A second, later set of dumps in which these counters moved: then the first dumps were taken at different "
         "moments.",),
        collect,
    )  # fmt: skip
