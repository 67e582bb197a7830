"""Fill in the global rank of a record that has only a GPU or a process id, from records of other lines and files.

For example, a line of the kernel log has a GPU's PCI address, and a line of an NCCL log has this address and the rank.
But this is the rank in an NCCL communicator. It counts as the global rank only if the communicator contains every
process that NCCL's logs and RAS answers name. Two hosts can have the same process id or PCI address, so a record that
fits two ranks gets no rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from repro.trace.foreign.records import Failure, Group, Launches, Left, Member, Note, Observation, Process

MAX_LISTED = 1 << 20
_WORKER_OF_ENGINE = re.compile(r"\w+[- ](\d{1,7}) of EngineCore_DP(\d{1,7})")
_WORKER = re.compile(r"(?:VLLM::)?Worker_DP(\d{1,7})(?:_TP(\d{1,7}))?(?:_EP\d{1,7})?")
_Key = tuple[str, int | None]


@dataclass(slots=True)
class _Ranks:
    """Tables that find the global rank of a process or a GPU. A host is "" if the evidence does not name it.

    of_process   the rank of each (host, pid)
    of_bus       the rank of each (host, PCI address of a GPU)
    members      what a log shows about a process in an NCCL communicator, by (host, pid, address of the communicator)
    groups       the group with its global ranks, by the name of its NCCL communicator
    """

    of_process: dict[_Key, int] = field(default_factory=dict)
    of_bus: dict[tuple[str, str], int] = field(default_factory=dict)
    members: dict[tuple[str, int | None, str], Member] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)

    def find(self, host: str, process: Process, bus: str = "") -> int | None:
        """Return the rank of a process; None if no rank matches, or if several ranks match.

        bus: the PCI address of the process's GPU. If it is given, it is looked up instead of the process id
        """
        if process.rank is not None:
            return process.rank
        if bus:
            found = {rank for (at, pci), rank in self.of_bus.items() if pci == bus and _same_host(host, at)}
        else:
            found = {rank for (at, pid), rank in self.of_process.items() if pid == process.pid and _same_host(host, at)}
        return found.pop() if len(found) == 1 else None


def join(records: Sequence[Observation]) -> list[Observation]:
    """Return the records in the same order. A record without a rank gets its rank if other records show this rank."""
    records = _with_workers_of_engines(records)
    members = [record for record in records if isinstance(record, Member)]
    if not members and not any(isinstance(it, Failure) and (it.bus or it.host) for it in records):
        return list(records)
    ranks = _ranks_of(members)
    return [_with_rank(record, ranks) for record in records]


def _with_workers_of_engines(records: Sequence[Observation]) -> Sequence[Observation]:
    """Fill in the global ranks of vLLM's workers in error messages, where each engine numbers its own workers from 0.

    For example, if each engine has two workers, "VllmWorker-1 of EngineCore_DP2" is rank 2 * 2 + 1 = 5.
    """
    if not any(isinstance(record, Failure) and _WORKER_OF_ENGINE.match(record.process.title) for record in records):
        return records
    workers: dict[tuple[int, int], set[int]] = {}
    sizes: dict[int, int] = {}
    for record in records:
        process = getattr(record, "process", None)
        if not isinstance(process, Process) or process.rank is None:
            continue
        if title := _WORKER.fullmatch(process.title):
            workers.setdefault((int(title[1]), int(title[2] or 0)), set()).add(process.rank)
            if title[2] is None:  # a title without "_TP": each engine has one worker
                sizes.setdefault(-1, 1)
        if isinstance(record, Note) and record.kind == "engine size":
            sizes[process.rank] = int(record.value)

    def rank_of(engine: int, number: int) -> int | None:
        size, ranks = sizes.get(engine, sizes.get(-1)), workers.get((engine, number), set())
        if len(ranks) == 1:
            return next(iter(ranks))
        return engine * size + number if size is not None and number < size and not ranks else None

    named = []
    for record in records:
        if isinstance(record, Failure) and (title := _WORKER_OF_ENGINE.match(record.process.title)):
            rank = rank_of(int(title[2]), int(title[1]))
            record = replace(record, process=replace(record.process, rank=rank))
        named.append(record)
    return named


def _ranks_of(members: Iterable[Member]) -> _Ranks:
    ranks = _Ranks()
    by_name: dict[str, list[Member]] = {}
    for member in members:
        by_name.setdefault(member.name, []).append(member)
        ranks.members[member.host, member.process.pid, member.pointer] = member
        if member.process.rank is not None:
            ranks.of_process[_key(member)] = member.process.rank
    communicators = {name: rows for name, rows in by_name.items() if _is_one_communicator(rows)}
    if not ranks.of_process:
        ranks.of_process = _by_the_world(communicators.values(), {_key(m) for m in members})
    for name, rows in communicators.items():
        numbers = {m.rank: ranks.of_process.get(_key(m)) for m in rows}
        size = rows[0].size
        if all(number == rank for rank, number in numbers.items()) and size <= MAX_LISTED:
            ranks.groups[name] = Group(name, f"NCCL communicator {name}", tuple(range(size)))
        elif len(numbers) == size and None not in numbers.values():
            listed = tuple(number for _, number in sorted(numbers.items()) if number is not None)
            ranks.groups[name] = Group(name, f"NCCL communicator {name}", listed)
        else:
            ranks.groups[name] = Group(name, f"NCCL communicator {name}")
    for member in ranks.members.values():
        rank = ranks.of_process.get(_key(member))
        if rank is not None and member.bus:
            ranks.of_bus[member.host, member.bus] = rank
    return ranks


def _by_the_world(communicators: Iterable[Sequence[Member]], seen: set[_Key]) -> dict[_Key, int]:
    """Return the global rank of each (host, pid) in ``seen``, from the largest communicator.

    If this communicator contains all processes in ``seen``, it contains all ranks, so its ranks are global ranks.
    Return {} if it lacks a process, or if two communicators of the largest size give different ranks.

    communicators   the processes of each NCCL communicator
    seen            all processes that the evidence shows in a communicator
    """
    rows = list(communicators)
    largest = max((members[0].size for members in rows), default=0)
    found = [
        {_key(m): m.rank for m in members}
        for members in rows
        if members[0].size == largest and seen == {_key(m) for m in members}
    ]
    return found[0] if found and all(numbers == found[0] for numbers in found) else {}


def _key(member: Member) -> _Key:
    return member.host, member.process.pid


def _is_one_communicator(rows: Sequence[Member]) -> bool:
    """Whether all these processes can belong to one NCCL communicator.

    They can if the communicator has the same `size` for all of them, and no rank has two processes.
    """
    processes: dict[int, _Key] = {}
    return all(row.size == rows[0].size and processes.setdefault(row.rank, _key(row)) == _key(row) for row in rows)


def _same_host(one: str, other: str) -> bool:
    """Whether two names can mean the same host: if one name is empty, or if they differ only in the domain."""
    return not one or not other or one.partition(".")[0] == other.partition(".")[0] or one == other


def _with_rank(record: Observation, ranks: _Ranks) -> Observation:
    match record:
        case Launches():
            member = ranks.members.get((record.host, record.process.pid, record.pointer))
            group = ranks.groups.get(member.name, record.group) if member else record.group
            process = replace(record.process, rank=ranks.find(record.host, record.process))
            return replace(record, process=process, group=group)
        case Failure():
            rank = ranks.find(record.host, record.process, record.bus)
            return replace(record, process=replace(record.process, rank=rank))
        case Left():
            return replace(record, seen_by=replace(record.seen_by, rank=ranks.find("", record.seen_by)))
        case Note() if record.process.pid is not None:
            return replace(record, process=replace(record.process, rank=ranks.find("", record.process)))
        case _:
            return record
