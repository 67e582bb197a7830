"""Judge the lines of NCCL's watchdog: who waits in which collective, who has not queued it, who waits elsewhere."""

from __future__ import annotations

from repro.trace.observed import Call, Group, Progress, TimedOut
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.scene import Scene
from repro.verdict.partial.words import call_in, ranks_of, verb


def judge_timeouts(scene: Scene) -> Diagnosis | None:
    if not scene.timeouts:
        return None
    known = [it for it in scene.timeouts if it.rank is not None]
    if not known:
        return _group_ranks_only(scene)
    group_of = {it.rank: it for it in scene.progress if it.rank is not None and it.enqueued is not None}
    calls: dict[tuple[str, int | None], dict[int, TimedOut]] = {}
    for it in known:
        calls.setdefault((it.call.op, it.call.seq), {}).setdefault(it.rank, it)  # type: ignore[arg-type]
    largest = max(calls.values(), key=len)
    sample = next(iter(largest.values()))
    group = _group(sample, group_of)
    waiting = sorted(largest)
    behind = sorted(
        rank for rank, row in group_of.items()
        if rank not in largest and (row.enqueued or 0) < (sample.call.seq or 0) and _same(row.group, group)
    )  # fmt: skip
    if len(calls) > 1:
        differing = _different_calls(scene, calls)
        if differing is not None:
            return differing
    elsewhere = [rank for rank in behind if _waits_elsewhere(scene, rank)]
    if behind and elsewhere == behind and len(waiting) > 0:
        return _two_groups(scene, sample, group, waiting, behind, group_of)
    if behind:
        return _absent(sample, group, waiting, behind, group_of)
    return _same_call(scene, sample, group, waiting, group_of)


def _group(sample: TimedOut, progress: dict[int, Progress]) -> Group | None:
    row = progress.get(sample.rank) if sample.rank is not None else None
    return row.group if row is not None else sample.group


def _same(one: Group, two: Group | None) -> bool:
    return two is None or one.name == two.name


def _waits_elsewhere(scene: Scene, rank: int) -> bool:
    """Whether that rank's own log shows it inside a collective of another backend: its traceback ends there."""
    return any(it.seen_by.rank == rank and it.text.startswith("gloo") for it in scene.left) or any(
        stack.activity == "collective" for stack in scene.main_stacks().get(rank, [])
    )


def _two_groups(
    scene: Scene,
    sample: TimedOut,
    group: Group | None,
    waiting: list[int],
    behind: list[int],
    progress: dict[int, Progress],
) -> Diagnosis:
    op = next(
        (s.detail for r in behind for s in scene.main_stacks().get(r, []) if s.activity == "collective"),
        "a collective such as all_gather",
    )
    first = next(it for it in scene.left if it.seen_by.rank in behind)
    evidence = [
        f"{ranks_of(waiting).capitalize()} queued {call_in(sample.call, group)} and wait in it ({sample.source})",
        f"{ranks_of(behind).capitalize()} never queued it: {verb(behind, 'its', 'their')} last "
        f"queued operation is #{progress[behind[0]].enqueued} ({progress[behind[0]].source})",
        f"{ranks_of(behind).capitalize()} {verb(behind, 'was', 'were')} in {op} of a gloo group "
        f"when {verb(behind, 'its', 'their')} peers ended ({first.source}): the error came after "
        "the fact and names nobody",
    ]
    evidence += [
        f"{note.text.capitalize()} ({note.source}): the first exit, after the time-out, and no cause"
        for note in scene.notes
        if note.kind == "torchrun"
    ][:1]
    return Diagnosis(
        "deadlock", "order", (), tuple(behind), "likely",
        (f"{ranks_of(waiting).capitalize()} wait in {call_in(sample.call, group)} for "
        f"{ranks_of(behind)}, and {ranks_of(behind)} wait in a gloo collective (all_gather) that "
        "the others never entered: a cycle over two groups.",
         "Which side left the common program is not in these logs."),
        tuple(evidence),
        ("The gloo group does not contain the ranks that wait in NCCL.",),
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


def _different_calls(scene: Scene, calls: dict[tuple[str, int | None], dict[int, TimedOut]]) -> Diagnosis | None:
    """Different operations under one number, in one group as far as the lines tell."""
    by_number: dict[int | None, list[dict[int, TimedOut]]] = {}
    for (_, number), rows in calls.items():
        by_number.setdefault(number, []).append(rows)
    for number, sides in by_number.items():
        if number is None or len(sides) < 2:
            continue
        names = {_name(scene, rank) for rows in sides for rank in rows}
        if len(names) != 1 or None in names:
            continue
        ordered = sorted(sides, key=len)
        few = tuple(sorted(ordered[0])) if len(ordered[0]) < len(ordered[-1]) else ()
        return Diagnosis(
            "deadlock", "mismatch", (), few, "likely",
            (f"Members of {next(iter(names))} wait in different operations under number {number}.",),
            tuple(f"{ranks_of(rows).capitalize()}: {_arguments(next(iter(rows.values())).call)} "
        f"({next(iter(rows.values())).source})" for rows in ordered),
            ("The lines are of different groups.",), (COLLECT["recorder"], COLLECT["stacks"]),
        )  # fmt: skip
    return None


def _name(scene: Scene, rank: int) -> str | None:
    return next((str(it.group) for it in scene.progress if it.rank == rank), None)


def _arguments(call: Call) -> str:
    return f"{call.op} #{call.seq}, sizes {[size[0] for size in call.sizes if size]}"


def _same_call(
    scene: Scene, sample: TimedOut, group: Group | None, waiting: list[int], progress: dict[int, Progress]
) -> Diagnosis:
    size = scene.world_size()
    ras = [(a, c) for a in scene.ras for c in a.communicators]
    largest = max((c.size for _, c in ras), default=0)
    total = max(size or 0, largest, max(waiting) + 1)
    row = progress.get(waiting[0])
    evidence = [
        f"{ranks_of(waiting).capitalize()} waited {sample.ran_s:.0f} s in "
        f"{call_in(sample.call, group)} ({sample.source})"
    ]
    ahead = (row.enqueued or 0) - (sample.call.seq or 0) if row is not None and row.enqueued is not None else 0
    if row is not None and ahead > 0:
        evidence.append(
            f"Rank {waiting[0]} had queued up to #{row.enqueued}, {ahead} more than the one that "
            f"hangs ({ahead + 1} outstanding), so its host went on ({row.source})"
        )
    for answer, communicator in ras[:3]:
        evidence.append(
            f"NCCL's RAS says {communicator.errors} for {communicator.size} ranks ({answer.source}): "
            "it counts what the hosts queued, and says nothing of what the devices completed"
        )
    unseen = sorted(set(range(total)) - set(waiting)) if total <= 4096 else []
    if unseen:
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            (f"{ranks_of(waiting).capitalize()} {verb(waiting, 'waits', 'wait')} in "
        f"{call_in(sample.call, group)}. Nothing says where {len(unseen)} other ranks are, so "
        "nobody can be called absent.",
             "A device or network stall fits, and so does an absent rank."),
            tuple(evidence), ("A log of another rank that stands elsewhere.",),
            (f"the logs of all ranks ({len(unseen)} other ranks are missing)", COLLECT["recorder"], COLLECT["kernel"]),
        )  # fmt: skip
    first = sample.call.seq == 1
    return Diagnosis(
        "stall", "", (), (), "likely",
        (f"All {len(waiting)} ranks wait in the same collective, {call_in(sample.call, group)}"
         f"{', the first collective of the group' if first else ''}. Nobody is absent.",),
        tuple(evidence), ("Sub-groups whose numbers happen to be equal.",),
        (COLLECT["nccl"], COLLECT["topology"] if first else COLLECT["kernel"], COLLECT["ras"]),
    )  # fmt: skip


def _group_ranks_only(scene: Scene) -> Diagnosis:
    """Lines up to torch 2.1 give ranks of a group and no group: equal numbers may be of one group or of several."""
    ranks = sorted({it.group_rank for it in scene.timeouts if it.group_rank is not None})
    calls = {(it.call.op, it.call.seq, it.call.sizes) for it in scene.timeouts}
    sample = scene.timeouts[0]
    if len(calls) > 1:
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            ("The lines name ranks of groups and no group: different operations may be of different groups.",),
            tuple(f"Group rank {it.group_rank}: {_arguments(it.call)} ({it.source})" for it in scene.timeouts[:8]), (),
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
         "Nobody is absent and nothing differs. This wording names no group, so sub-groups with "
        "equal numbers would look the same."),
        (f"{len(ranks)} watchdog lines with equal operation, number and size, the first at "
        f"{sample.source}; who printed first is no finding",),
        ("A rank whose line shows another operation or number.",),
        (COLLECT["nccl"], COLLECT["topology"], COLLECT["ras"]),
    )  # fmt: skip
