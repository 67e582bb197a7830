"""Judge logs of NCCL_DEBUG=INFO, which show the operations that each process launched on a communicator.

These logs do not show which operations completed.
"""

from __future__ import annotations

from collections.abc import Mapping

from repro.trace.foreign.records import Group, Launches
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import arguments, ranks_of


def judge_launches(job: JobRecords) -> Diagnosis | None:
    groups: dict[Group, dict[int, Launches]] = {}
    for row in job.launches:
        if row.process.rank is not None and row.group.members:
            groups.setdefault(row.group, {})[row.process.rank] = row
    if not groups:
        return None
    evidence: list[str] = []
    behind: set[int] = set()
    for group, rows in groups.items():
        counts = {rank: row.count for rank, row in rows.items() if row.count is not None}
        if len(counts) > 1 and len(set(counts.values())) > 1:
            fewer = {rank for rank, count in counts.items() if count < max(counts.values())}
            behind |= fewer
            evidence.append(
                f"On {group} {ranks_of(fewer)} launched fewer operations: "
                + ", ".join(f"rank {rank} {counts[rank]} ({rows[rank].source})" for rank in sorted(counts)[:6])
            )
        evidence += _different(group, rows)
    summary = (
        f"{ranks_of(behind).capitalize()} launched fewer operations than other members of a communicator."
        if behind else "The members of each communicator launched equally many operations."
    )  # fmt: skip
    return Diagnosis(
        "inconclusive", "", (), tuple(sorted(behind)), "undecided",
        (summary, "NCCL's log shows what the host launched, and not what completed. A log that was cut also shows "
                  "fewer launches."),
        tuple(evidence[:8]), (), (COLLECT["stacks"], COLLECT["recorder"], COLLECT["kernel"]),
    )  # fmt: skip


def _different(group: Group, rows: Mapping[int, Launches]) -> list[str]:
    """Return a sentence on the first launch whose operation differs between members of a group; [] if none differs.

    rows: rank -> the operations that the rank launched in the group
    """
    calls = {(call.seq, rank): call for rank, row in rows.items() for call in row.calls if call.seq is not None}
    by_number: dict[int, dict[int, str]] = {}
    for (number, rank), call in calls.items():
        by_number.setdefault(number or 0, {})[rank] = call.op
    for number, ops in sorted(by_number.items()):
        if len(set(ops.values())) > 1:
            sides = "; ".join(f"rank {rank} {arguments(calls[number, rank])}" for rank in sorted(ops)[:6])
            return [f"On {group} launch {number} differs: {sides}"]
    return []
