"""Judge lines of torch's watchdog: which ranks wait in a collective, and which ranks have not queued it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from repro.trace.foreign.records import Call, Group, Progress, TimedOut
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.sides import UNKNOWN_INSIDE
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import call_in, ranks_of, verb

Calls = Mapping[tuple[str, str, int | None], Mapping[int, TimedOut]]
"""For each (group, operation, sequence number), a dict from rank to the time-out that the rank's watchdog reported."""


def judge_timeouts(job: JobRecords) -> Diagnosis | None:
    if not job.timeouts:
        return None
    known = [record for record in job.timeouts if record.rank is not None]
    if not known:
        return _group_ranks_only(job)
    rows = {record: _row(record, job.progress) for record in known}
    calls: dict[tuple[str, str, int | None], dict[int, TimedOut]] = {}
    for record in known:
        key = (_group_name(record, rows[record]), record.call.op, record.call.seq)
        calls.setdefault(key, {}).setdefault(record.rank, record)  # type: ignore[arg-type]
    differing = _different_calls(calls, rows)
    if differing is not None:
        return differing
    named = {name for name, _, _ in calls if name}
    if len(calls) > 1:
        return _several_calls(calls, rows) if len(named) > 1 else _several_waits(calls, rows)
    largest = next(iter(calls.values()))
    sample = next(iter(largest.values()))
    row = rows[sample]
    waiting = sorted(largest)
    counters = _counters(job, row)
    behind = sorted(
        rank for rank, progress in counters.items()
        if rank not in largest and (progress.enqueued or 0) < (sample.call.seq or 0)
    )  # fmt: skip
    group = row.group if row is not None else sample.group
    elsewhere = [rank for rank in behind if _waits_elsewhere(job, rank)]
    if behind and elsewhere == behind:
        return _two_groups(job, sample, group, waiting, behind, counters)
    if behind:
        return _absent(sample, group, waiting, behind, counters)
    return _same_call(job, sample, group, waiting, row)


def _row(timeout: TimedOut, progress: Sequence[Progress]) -> Progress | None:
    """Return the counters that belong to a time-out: the same watchdog printed them, for the same group.

    The counters are the numbers of the operations that the rank last queued and last completed in the group. The log
    of a rank may also have counters of other groups. For example, torch prints the counters of the default group when
    it asks for a Flight Recorder dump.

    progress   the counters in all log lines of the job. If several belong to the time-out, the nearest line is taken
    """
    fitting = [
        row for row in progress
        if row.rank == timeout.rank and row.group_rank == timeout.group_rank and _fits(row, timeout)
    ]  # fmt: skip
    return min(fitting, key=lambda row: _distance(row, timeout), default=None)


def _fits(row: Progress, timeout: TimedOut) -> bool:
    number = timeout.call.seq
    if timeout.group is not None and timeout.group.name != row.group.name:
        return False
    if number is None or row.stuck is not None:
        return row.stuck == number
    return row.enqueued is not None and row.enqueued >= number and (row.completed is None or row.completed < number)


def _distance(row: Progress, timeout: TimedOut) -> tuple[bool, int]:
    """Return how far two log lines are apart, as a sort key: (whether they are in different files, number of lines)."""
    places = [re.search(r"\d+", source.place) for source in (row.source, timeout.source)]
    lines = [int(place[0]) if place else 0 for place in places]
    return row.source.file != timeout.source.file, abs(lines[0] - lines[1])


def _group_name(timeout: TimedOut, row: Progress | None) -> str:
    group = row.group if row is not None else timeout.group
    return group.name if group is not None else ""


def _counters(job: JobRecords, row: Progress | None) -> dict[int, Progress]:
    """Return, for each rank, the numbers of the operations that it last queued and last completed in a group.

    row   a log line that names the group. If it is None, the group is not known: use the last line of each rank,
          whatever group it names
    """
    same_group = [record for record in job.progress if row is None or record.group.name == row.group.name]
    return {record.rank: record for record in same_group if record.rank is not None and record.enqueued is not None}


def _waits_elsewhere(job: JobRecords, rank: int) -> bool:
    """Whether a rank that has not queued the timed-out collective waits in another collective.

    A gloo error in the log of the rank, or one of its stacks, shows this.
    """
    return any(record.seen_by.rank == rank and record.text.startswith("gloo") for record in job.left) or any(
        stack.activity == "collective" for stack in job.main_stacks().get(rank, [])
    )


def _two_groups(
    job: JobRecords,
    sample: TimedOut,
    group: Group | None,
    waiting: list[int],
    behind: list[int],
    progress: dict[int, Progress],
) -> Diagnosis:
    op = next(
        (s.detail for r in behind for s in job.main_stacks().get(r, []) if s.activity == "collective"),
        "a collective such as all_gather",
    )
    first = next(record for record in job.left if record.seen_by.rank in behind)
    evidence = [
        f"{ranks_of(waiting).capitalize()} queued {call_in(sample.call, group)} and wait in it ({sample.source})",
        f"{ranks_of(behind).capitalize()} never queued it: {verb(behind, 'its', 'their')} last "
        f"queued operation is #{progress[behind[0]].enqueued} ({progress[behind[0]].source})",
        f"{ranks_of(behind).capitalize()} {verb(behind, 'was', 'were')} in {op} of a gloo group when "
        f"{verb(behind, 'its', 'their')} peers ended ({first.source}): this error is a consequence, and does not name "
        "a cause",
    ]
    evidence += [
        f"{note.text.capitalize()} ({note.source}): this process ended first, but only after the time-out, so it is "
        "not the cause"
        for note in job.notes
        if note.kind == "torchrun"
    ][:1]
    return Diagnosis(
        "deadlock", "order", (), tuple(behind), "likely",
        (f"{ranks_of(waiting).capitalize()} wait in {call_in(sample.call, group)} for "
        f"{ranks_of(behind)}, and {ranks_of(behind)} wait in a gloo collective (all_gather) that "
        "the others never entered: a cycle over two groups.",
         "These logs do not show which rank issued the wrong operation."),
        tuple(evidence),
        ("The members of the gloo group, if the ranks that wait in NCCL are not among them.",),
        (COLLECT["recorder"], COLLECT["stacks"]),
    )  # fmt: skip


def _absent(
    sample: TimedOut, group: Group | None, waiting: list[int], behind: list[int], progress: dict[int, Progress]
) -> Diagnosis:
    return Diagnosis(
        "inconclusive", "", (), tuple(behind), "undecided",
        (f"{ranks_of(behind).capitalize()} {verb(behind, 'has', 'have')} not queued "
        f"{call_in(sample.call, group)}, in which {ranks_of(waiting)} "
        f"{verb(waiting, 'waits', 'wait')}.",),
        tuple(f"Rank {r}: last queued operation #{progress[r].enqueued} ({progress[r].source})" for r in behind[:4]),
        (), (f"stacks of {ranks_of(behind)}: py-spy dump --nonblocking --pid PID", COLLECT["recorder"]),
    )  # fmt: skip


def _different_calls(calls: Calls, rows: Mapping[TimedOut, Progress | None]) -> Diagnosis | None:
    """Judge time-outs of one group and sequence number whose operations or sizes differ; None if there are none.

    calls   (group, operation, sequence number) -> rank -> the time-out of this rank
    rows    time-out -> the rank's counters of queued and completed operations; None if the logs do not have them
    """
    by_number: dict[tuple[str, int], list[TimedOut]] = {}
    for (name, op, number), by_rank in calls.items():
        if name and number is not None and op not in UNKNOWN_INSIDE:
            by_number.setdefault((name, number), []).extend(by_rank.values())
    for timeouts in by_number.values():
        sides: dict[tuple[object, ...], list[TimedOut]] = {}
        for record in timeouts:
            sized = record.call.op in ("all_reduce", "all_gather", "reduce_scatter")
            sides.setdefault((record.call.op, record.call.sizes if sized else ()), []).append(record)
        if len(sides) > 1:
            return _sides(list(sides.values()), rows)
    return None


def _sides(sides: Sequence[Sequence[TimedOut]], rows: Mapping[TimedOut, Progress | None]) -> Diagnosis:
    ordered = sorted(sides, key=len)
    sample = ordered[0][0]
    row = rows[sample]
    one_op = len({side[0].call.op for side in sides}) == 1
    few = (
        sorted(record.rank for record in ordered[0] if record.rank is not None)
        if len(ordered[0]) < len(ordered[-1])
        else []
    )
    return Diagnosis(
        "deadlock", "sizes" if one_op else "mismatch", (), tuple(few), "likely",
        (f"Members of {row.group if row else 'one group'} wait in different {'sizes' if one_op else 'operations'} "
         f"under number {sample.call.seq}.",),
        tuple(f"{ranks_of(_ranks(side)).capitalize()}: {_arguments(side[0].call)} "
              f"({side[0].source})" for side in ordered),
        ("The group of each line, if the groups differ.",), (COLLECT["recorder"], COLLECT["stacks"]),
    )  # fmt: skip


def _ranks(timeouts: Sequence[TimedOut]) -> list[int]:
    return sorted(record.rank for record in timeouts if record.rank is not None)


def _several_calls(calls: Calls, rows: Mapping[TimedOut, Progress | None]) -> Diagnosis:
    return _unordered(
        calls, rows, "The ranks wait in several groups, and the lines do not list the members of a group: some of "
                     "these waits may follow from others.",
    )  # fmt: skip


def _several_waits(calls: Calls, rows: Mapping[TimedOut, Progress | None]) -> Diagnosis:
    return _unordered(calls, rows, "The ranks wait in different operations, and some lines do not name the group.")


def _unordered(calls: Calls, rows: Mapping[TimedOut, Progress | None], why: str) -> Diagnosis:
    evidence = []
    for timeouts in list(calls.values())[:8]:
        sample = next(iter(timeouts.values()))
        row = rows[sample]
        since = min((record.since_s for record in timeouts.values() if record.since_s is not None), default=None)
        after = f", since {_clock(since)}" if since is not None else ""
        evidence.append(
            f"{ranks_of(timeouts).capitalize()} {verb(list(timeouts), 'waits', 'wait')} in "
            f"{call_in(sample.call, row.group if row else None)}{after} ({sample.source})"
        )
    return Diagnosis(
        "inconclusive", "", (), (), "undecided", (why,), tuple(evidence), (), (COLLECT["recorder"], COLLECT["stacks"]),
    )  # fmt: skip


def _clock(seconds: float) -> str:
    """Format seconds since the start of the year as a time of day."""
    minutes, second = divmod(int(seconds) % 86_400, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}"


def _arguments(call: Call) -> str:
    return f"{call.op} #{call.seq}, sizes {[size[0] for size in call.sizes if size]}"


def _same_call(
    job: JobRecords, sample: TimedOut, group: Group | None, waiting: list[int], row: Progress | None
) -> Diagnosis:
    size = job.world_size()
    ras = [(a, c) for a in job.ras for c in a.communicators]
    largest = max((c.size for _, c in ras), default=0)
    total = max(size or 0, largest, max(waiting) + 1)
    evidence = [
        f"{ranks_of(waiting).capitalize()} waited {sample.ran_s:.0f} s in "
        f"{call_in(sample.call, group)} ({sample.source})"
    ]
    ahead = (row.enqueued or 0) - (sample.call.seq or 0) if row is not None and row.enqueued is not None else 0
    if row is not None and ahead > 0:
        evidence.append(
            f"Rank {sample.rank} had queued operations up to #{row.enqueued}, {ahead} after the one that hangs "
            f"({ahead + 1} outstanding), so its host went on ({row.source})"
        )
    for answer, communicator in ras[:3]:
        evidence.append(
            f"NCCL's RAS says {communicator.errors} for {communicator.size} ranks ({answer.source}): "
            "it counts what the hosts queued, and says nothing of what the devices completed"
        )
    unseen = sorted(set(range(total)) - set(waiting)) if total <= 4096 else []
    if unseen:
        rest = "the other rank is" if len(unseen) == 1 else f"the {len(unseen)} other ranks are"
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            (f"{ranks_of(waiting).capitalize()} {verb(waiting, 'waits', 'wait')} in {call_in(sample.call, group)}. "
             f"Nothing shows where {rest}, so a rank may be absent.",
             "A stopped device or network would look like this, and so would an absent rank."),
            tuple(evidence), ("The log of another rank that is elsewhere.",),
            (f"the logs of all ranks ({rest} missing)", COLLECT["recorder"], COLLECT["kernel"]),
        )  # fmt: skip
    first = sample.call.seq == 1
    known = max(size or 0, largest) > 0
    return Diagnosis(
        "stall", "", (), (), "likely",
        (f"All {len(waiting)} ranks {'' if known else 'seen here '}wait in the same collective, "
         f"{call_in(sample.call, group)}{', the first collective of the group' if first else ''}. "
         f"None{'' if known else ' of these ranks'} is absent.",),
        tuple(evidence),
        ("Several groups whose sequence numbers happen to be equal." if known else
         "Further ranks, whose logs are missing: the world size is not in these files.",),
        (COLLECT["nccl"], COLLECT["topology"] if first else COLLECT["kernel"], COLLECT["ras"]),
    )  # fmt: skip


def _group_ranks_only(job: JobRecords) -> Diagnosis:
    """Judge the time-outs that torch 2.1 and older print.

    The lines have group ranks, but do not name the group. So equal sequence numbers can belong to several groups.
    """
    ranks = sorted({record.group_rank for record in job.timeouts if record.group_rank is not None})
    calls = {(record.call.op, record.call.seq, record.call.sizes) for record in job.timeouts}
    sample = job.timeouts[0]
    if len(calls) > 1:
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            ("The lines give ranks within a group but do not name the group: different operations may be of different "
             "groups.",),
            tuple(f"Group rank {record.group_rank}: {_arguments(record.call)} ({record.source})"
              for record in job.timeouts[:8]), (),
            (COLLECT["recorder"], COLLECT["stacks"]),
        )  # fmt: skip
    whole = ranks == list(range(len(ranks))) and len(ranks) > 1
    first = sample.call.seq == 1
    all_of_them = f"All {len(ranks)} ranks (ranks {ranks[0]}-{ranks[-1]})"
    who = all_of_them if whole else f"{ranks_of(ranks).capitalize()} of a group"
    return Diagnosis(
        "stall" if whole else "inconclusive", "", (), (), "likely" if whole else "undecided",
        (f"{who} wait in the same collective: {sample.call.op} #{sample.call.seq}"
         f"{', the first collective' if first else ''}, SeqNum={sample.call.seq}.",
         "No rank is absent, and the operations do not differ. These lines name no group: several groups with equal "
         "sequence numbers would look the same."),
        (f"{len(ranks)} watchdog lines with equal operation, number and size, the first at {sample.source}; the order "
         "of the lines proves nothing",),
        ("A rank whose line shows another operation or number.",),
        (COLLECT["nccl"], COLLECT["topology"], COLLECT["ras"]),
    )  # fmt: skip
