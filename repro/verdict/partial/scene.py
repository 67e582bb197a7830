"""All records about one job, sorted by rank and joined: what each rank waits in, how far it came in each group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from repro.trace.observed import (
    Failure,
    Group,
    GroupRecord,
    Left,
    Mismatch,
    Note,
    Observation,
    Process,
    Progress,
    RasAnswer,
    RecorderDump,
    Stack,
    TimedOut,
)


@dataclass(slots=True)
class Scene:
    """The records of a job by kind, with the ranks filled in that other records reveal."""

    recorders: dict[int, RecorderDump] = field(default_factory=dict)
    timeouts: list[TimedOut] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    ras: list[RasAnswer] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, records: Iterable[Observation]) -> Scene:
        scene = cls()
        rows = list(records)
        ranks = _ranks_of_processes(rows)
        for record in rows:
            match record:
                case RecorderDump():
                    scene._add_recorder(record)
                case TimedOut():
                    scene.timeouts.append(record)
                case Progress():
                    scene.progress.append(record)
                case Stack():
                    scene.stacks.append(replace(record, process=_with_rank(record.process, ranks)))
                case Failure():
                    scene.failures.append(replace(record, process=_with_rank(record.process, ranks)))
                case Left():
                    scene.left.append(record)
                case Mismatch():
                    scene.mismatches.append(record)
                case RasAnswer():
                    scene.ras.append(record)
                case Note():
                    scene.notes.append(replace(record, process=_with_rank(record.process, ranks)))
        scene.recorders = dict(sorted(_with_members(scene.recorders).items()))
        scene.stacks = _with_looks(scene.stacks)
        return scene

    def _add_recorder(self, dump: RecorderDump) -> None:
        known = self.recorders.get(dump.rank)
        if known is None or len(_frames(dump)) > len(_frames(known)) or (dump.at_s or 0) > (known.at_s or 0):
            self.recorders[dump.rank] = dump
        if known is not None and known.at_s != dump.at_s:
            self.contradictions.append(
                f"Two dumps of rank {dump.rank} are of different moments ({known.source}, {dump.source}); "
                "the newer one is used."
            )

    def main_stacks(self, role: str = "worker") -> dict[int, list[Stack]]:
        """Rank -> the stacks of the thread that runs the program, one a look; only processes of this part."""
        found: dict[int, list[Stack]] = {}
        for stack in self.stacks:
            if stack.process.rank is not None and stack.process.role in (role, "") and _is_main(stack):
                found.setdefault(stack.process.rank, []).append(stack)
        return dict(sorted(found.items()))

    def ranks(self) -> list[int]:
        """All ranks that any record speaks of."""
        seen: set[int] = set(self.recorders) | set(self.main_stacks())
        named = [it.rank for it in self.timeouts] + [it.rank for it in self.progress]
        named += [it.process.rank for it in self.failures] + [it.process.rank for it in self.notes]
        return sorted(seen | {rank for rank in named if rank is not None})

    def world_size(self) -> int | None:
        """The number of ranks, where a line or a group tells it."""
        sizes = [int(note.value) for note in self.notes if note.kind == "world" and note.value.isdigit()]
        sizes += [len(g.members) for d in self.recorders.values() for g in d.configured if g.members]
        return max(sizes, default=None)


def _frames(dump: RecorderDump) -> list[str]:
    return [frame for record in dump.groups for call in record.calls[-1:] for frame in call.frames]


def _is_main(stack: Stack) -> bool:
    if stack.thread:
        return stack.thread in ("MainThread", "main") or stack.thread.startswith(("python", "pt_main"))
    return not any("threading.py" in frame for frame in stack.frames[-3:])


def _ranks_of_processes(records: Sequence[Observation]) -> dict[int, int]:
    """pid -> rank, from every record that gives both; a pid that stands for two ranks is of two hosts, and left out."""
    seen: dict[int, set[int]] = {}
    for record in records:
        process = getattr(record, "process", None)
        if isinstance(process, Process) and process.pid is not None and process.rank is not None:
            seen.setdefault(process.pid, set()).add(process.rank)
    return {pid: ranks.pop() for pid, ranks in seen.items() if len(ranks) == 1}


def _with_rank(process: Process, ranks: Mapping[int, int]) -> Process:
    if process.rank is None and process.pid is not None and process.pid in ranks:
        return replace(process, rank=ranks[process.pid])
    return process


def _with_members(recorders: Mapping[int, RecorderDump]) -> dict[int, RecorderDump]:
    """Fill in what one dump alone does not say: members of groups that gloo dumps do not list, and the group of a
    counter without entries, by what fellow members call the same id.
    """
    recorded: dict[str, set[int]] = {}
    names: dict[str, dict[str, set[int]]] = {}  # id -> name -> ranks that call it so
    for rank, dump in recorders.items():
        for record in dump.groups:
            if record.calls:
                recorded.setdefault(record.group.name, set()).add(rank)
            if record.number and record.group.name:
                names.setdefault(record.number, {}).setdefault(record.group.name, set()).add(rank)

    def complete(dump: RecorderDump, record: GroupRecord) -> GroupRecord:
        group = record.group
        if not group.name and record.number in names:
            mine = {it.name: it for it in dump.configured}
            fitting = [mine[name] for name in names[record.number] if name in mine and dump.rank in mine[name].members]
            if len(fitting) == 1:
                group = fitting[0]
        if group.name and not group.members:
            group = replace(group, members=tuple(sorted(recorded.get(group.name, ()))))
        return replace(record, group=group)

    return {
        rank: replace(dump, groups=tuple(complete(dump, record) for record in dump.groups))
        for rank, dump in recorders.items()
    }


def _with_looks(stacks: Sequence[Stack]) -> list[Stack]:
    """Number the looks at each thread of each process by the order of their files."""
    looks: Counter[tuple[object, ...]] = Counter()
    numbered = []
    for stack in sorted(stacks, key=lambda it: it.source.file):
        key = (stack.process.rank, stack.process.role, stack.process.pid, stack.thread)
        numbered.append(replace(stack, look=looks[key]))
        looks[key] += 1
    return numbered


def groups_of(recorders: Mapping[int, RecorderDump]) -> dict[Group, dict[int, GroupRecord]]:
    """Group -> rank -> what that rank recorded of it."""
    found: dict[Group, dict[int, GroupRecord]] = {}
    for rank, dump in recorders.items():
        for record in dump.groups:
            if record.group.name and len(record.group.members) > 1:
                key = Group(record.group.name, "", record.group.members)
                found.setdefault(key, {})[rank] = record
    return found
