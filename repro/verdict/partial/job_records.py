"""All records of the evidence of one job, sorted by kind, for the rules of `verdict/partial`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from repro.trace.foreign.records import (
    Connections,
    Failure,
    Launches,
    Left,
    LockLook,
    Mismatch,
    Note,
    Observation,
    Process,
    ProcessLook,
    Progress,
    RasAnswer,
    RecorderDump,
    Stack,
    TimedOut,
)
from repro.trace.knowledge import COLLECTIVES
from repro.verdict.partial.dumps.members import groups_of, with_members
from repro.verdict.partial.dumps.moments import describe_equal, describe_stale, moments_of, stale_dumps, world_sizes


@dataclass(slots=True)
class JobRecords:
    """The records of the evidence of one job, sorted by kind.

    If a stack, an error or a note has no rank, the rank is taken from another record with the same process id.

    recorders            rank -> its newest usable Flight Recorder dump
    earlier              rank -> the oldest dump of the same process, if it is older than the newest one
    timeouts, progress   from torch's watchdog: the collectives that timed out, and the numbers of the operations that a
                         rank last queued and completed in a group
    launches             from logs of NCCL_DEBUG=INFO: the operations that each process launched
    failures             lines that say why a process ended
    left                 lines in which a process reports that another process left the job
    mismatches           from TORCH_DISTRIBUTED_DEBUG=DETAIL: ranks that called different collectives
    ras                  the answers of NCCL's RAS
    notes                log lines that prove nothing by themselves, such as versions
    process_looks, lock_looks, connections   what `hmr collect` observed of processes, lock files and TCP connections
    contradictions       lines about dumps that are not used, or that can mislead
    ranks_by_world_size  number of ranks in the default group -> the ranks whose dump has this number. If there are
                         several numbers, the dumps are of several jobs
    """

    recorders: dict[int, RecorderDump] = field(default_factory=dict)
    earlier: dict[int, RecorderDump] = field(default_factory=dict)
    timeouts: list[TimedOut] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    launches: list[Launches] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    ras: list[RasAnswer] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    process_looks: list[ProcessLook] = field(default_factory=list)
    lock_looks: list[LockLook] = field(default_factory=list)
    connections: list[Connections] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    ranks_by_world_size: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Observation]) -> JobRecords:
        job = cls()
        rows = list(records)
        dumps = [record for record in rows if isinstance(record, RecorderDump)]
        ranks = _ranks_of_processes(rows)
        for record in rows:
            match record:
                case TimedOut():
                    job.timeouts.append(record)
                case Progress():
                    job.progress.append(record)
                case Launches():
                    job.launches.append(record)
                case Stack():
                    job.stacks.append(replace(record, process=_with_rank(record.process, ranks)))
                case Failure():
                    job.failures.append(replace(record, process=_with_rank(record.process, ranks)))
                case Left():
                    job.left.append(record)
                case Mismatch():
                    job.mismatches.append(record)
                case RasAnswer():
                    job.ras.append(record)
                case ProcessLook():
                    job.process_looks.append(record)
                case LockLook():
                    job.lock_looks.append(record)
                case Connections():
                    job.connections.append(record)
                case Note():
                    job.notes.append(replace(record, process=_with_rank(record.process, ranks)))
        job.ranks_by_world_size = world_sizes(dumps)
        job._add_recorders(dumps)
        job.stacks = _with_looks(job.stacks)
        return job

    def _add_recorders(self, dumps: Sequence[RecorderDump]) -> None:
        """Keep the newest usable dump of each rank and, if there is one, the oldest dump of the same process.

        A dump is not usable in two cases, in which it would wrongly show that the rank has not queued some operations:

        - It was taken too early: it ends before an operation that another member of the group has completed, and that
          no member can complete before all members have queued it.
        - Its entries have no group, no number or no state.
        """
        blind = [dump for dump in dumps if COLLECTIVES not in dump.knows]
        if blind:
            self.contradictions.append(
                f"{len(blind)} dumps, the first {blind[0].source}, do not have the groups, the numbers or the states "
                "of their entries, and are not used. The recorder of torch 2.2 or newer writes them."
            )
        moments = moments_of(dump for dump in dumps if COLLECTIVES in dump.knows)
        self.contradictions += moments.remarks
        if moments.equal:
            self.contradictions.append(describe_equal(moments.equal))
        last = with_members(moments.last)
        stale = stale_dumps(groups_of(last))
        self.contradictions += describe_stale(stale, last)
        self.recorders = {rank: dump for rank, dump in sorted(last.items()) if rank not in stale}
        self.earlier = {rank: dump for rank, dump in moments.earlier.items() if rank not in stale}

    def main_stacks(self, role: str = "worker") -> dict[int, list[Stack]]:
        """Return, for each rank, the stacks of its main thread, oldest first.

        role   "worker", or "engine" for the engine processes of a server. Processes without a role count for both
        """
        result: dict[int, list[Stack]] = {}
        for stack in self.stacks:
            if stack.process.rank is not None and stack.process.role in (role, "") and is_main(stack):
                result.setdefault(stack.process.rank, []).append(stack)
        return dict(sorted(result.items()))

    def ranks(self) -> list[int]:
        """Return, in ascending order, the ranks of dumps, stacks of main threads, watchdog lines, errors and notes."""
        seen: set[int] = set(self.recorders) | set(self.main_stacks())
        named = [record.rank for record in self.timeouts] + [record.rank for record in self.progress]
        named += [record.process.rank for record in self.failures] + [record.process.rank for record in self.notes]
        return sorted(seen | {rank for rank in named if rank is not None})

    @property
    def has_devices(self) -> bool:
        """Whether a host of the job has accelerators.

        If so, a busy core does not prove that a rank works: a rank that waits for its accelerator can also keep a core
        busy.
        """
        return any(note.kind == "devices" for note in self.notes)

    def world_size(self) -> int | None:
        """Return the number of ranks of the job: the largest that a log line or dump gives; None if none gives it."""
        sizes = [int(note.value) for note in self.notes if note.kind == "world" and note.value.isdigit()]
        sizes += [len(g.members) for d in self.recorders.values() for g in d.configured if g.members]
        return max(sizes, default=None)


def is_main(stack: Stack) -> bool:
    """Whether a stack belongs to the main thread, which runs the program."""
    if stack.thread:
        return stack.thread in ("MainThread", "main") or stack.thread.startswith(("python", "pt_main"))
    return not any("threading.py" in frame for frame in stack.frames[-3:])


def _ranks_of_processes(records: Sequence[Observation]) -> dict[int, int]:
    """Return the rank of each pid, from records that have both. A pid of several ranks (on two hosts) is left out."""
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


def _with_looks(stacks: Sequence[Stack]) -> list[Stack]:
    """Set `Stack.look` of each stack: its number, from 0, among the stacks of its thread, sorted by file name."""
    looks: Counter[tuple[object, ...]] = Counter()
    numbered = []
    for stack in sorted(stacks, key=lambda record: record.source.file):
        key = (stack.process.rank, stack.process.role, stack.process.pid, stack.thread)
        numbered.append(replace(stack, look=looks[key]))
        looks[key] += 1
    return numbered
