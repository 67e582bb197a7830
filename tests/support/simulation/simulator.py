"""An event-driven scheduler of simulated ranks: collectives, queues for locks, builds that take time, and deaths.

Each rank runs a program and records it as a real rank would. Afterwards the scheduler knows for certain which ranks are
stuck, which run, and which collectives were paired, without having read a witness.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from channel import Channel, GroupKey
from muted import Muted
from scene import MS, SMALL, make_recorder

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.store.run_dir import RunDir
from repro.trace.knowledge import Knows
from repro.trace.witness.file import Witness, parse
from repro.trace.witness.format import Geometry

Action = tuple[Any, ...]


@dataclass
class Rank:
    """One simulated process."""

    life: Iterator[Action]
    clock_skew_ns: int
    blocked: tuple[str, Any] | None = None  # ("meeting", (key, seq)) or ("lock", name)
    state: str = "running"  # running, spinning, done, dead, failed
    step: int = -1
    marked: bool = False  # about to act on its fault
    tickets: dict[str, tuple[GroupKey, int, Collective, int]] = field(default_factory=dict)
    log: list[tuple[int, Action]] = field(default_factory=list)


class Simulation:
    """Programs, one per rank, run to rest or to a moment.

    stalls   (group name, seq) whose completion the device swallows
    locks    name -> pid of an outside process that holds it from the start, 0 for a stale file
    aborts   a rank dies when its size vector is not its peers', as a backend that checks late does
    one_side a meeting whose members differ completes for the largest side, as gloo may complete it
    scale    how many times longer everything takes
    folder   of a run, whose witness files the ranks write
    hidden   rank -> the aspects that its recorder leaves out
    """

    def __init__(
        self,
        programs: Sequence[Sequence[Action]],
        groups: Mapping[str, Sequence[tuple[int, ...]]],
        *,
        seed: int = 0,
        shape: Geometry = SMALL,
        hosts: int = 1,
        stalls: Iterable[tuple[str, int]] = (),
        locks: Mapping[str, int] | None = None,
        aborts: bool = False,
        one_side: bool = False,
        scale: int = 1,
        folder: Path | None = None,
        hidden: Mapping[int, Knows] | None = None,
    ) -> None:
        self.num_ranks = len(programs)
        self._scale = scale
        self.now_ns = 0
        self._rng = random.Random(seed)
        self._stalls, self._aborts, self._one_side = set(stalls), aborts, one_side
        self.channels: dict[GroupKey, Channel] = {}
        self._of_rank: list[dict[str, tuple[int, ...]]] = []
        self.locks: dict[str, int | None] = {name: -1 - pid for name, pid in (locks or {}).items()}  # holder
        self.frozen: dict[int, int] = {}  # until when a signal has stopped the process of a rank
        self.acted: set[int] = set()  # ranks whose fault has shown: they issued something, or ended, after their mark
        self._outside, self._hosts = set(self.locks), hosts
        self._queue: list[tuple[int, int, int]] = []
        self._count = 0
        self.ranks: list[Rank] = []
        self.files: list[Any] = []
        self.recorders: list[Any] = []
        # A host's monotonic clock counts from its own start, and its wall clock is off by some tenths of a second.
        skews_ns = [0, *(self._rng.randint(-(10**15), 10**15) for _ in range(1, hosts))]
        self.skews_ns = skews_ns
        self.wall_errors_ns = [0, *(self._rng.randint(-300 * MS, 300 * MS) for _ in range(1, hosts))]
        for rank, program in enumerate(programs):
            host = rank * hosts // self.num_ranks
            skew_ns = skews_ns[host]
            clock = self._clock(10**16 + skew_ns)
            off_ns = 10**16 + skew_ns + self.wall_errors_ns[host]
            path = RunDir(folder).witness(rank) if folder else None
            buffer, recorder = make_recorder(rank, self.num_ranks, clock, shape, "run", host, off_ns, path)
            mine = {name: members for name, sets in groups.items() for members in sets if rank in members}
            recorder = Muted(recorder, hidden[rank]) if hidden and rank in hidden else recorder
            recorder.groups(mine)
            self._of_rank.append(mine)
            self.files.append(buffer)
            self.recorders.append(recorder)
            self.ranks.append(Rank(iter(program), 10**16 + skew_ns))
            self._wake(rank, self._rng.randrange(5 * MS))

    def _clock(self, offset_ns: int) -> Any:
        return lambda: self.now_ns + offset_ns

    def clocks(self, extra_ns: int = 0) -> dict[int, int]:
        """The time now on each rank's own clock."""
        return {rank: self.now_ns + extra_ns + each.clock_skew_ns for rank, each in enumerate(self.ranks)}

    def witnesses(self) -> dict[int, Witness]:
        return {rank: parse(bytes(data), f"rank{rank:03d}.wit") for rank, data in enumerate(self.files)}

    def timeline(self) -> str:
        """What every rank did, for a failing test to print."""
        log = ((t, rank, action) for rank, each in enumerate(self.ranks) for t, action in each.log)
        rows = sorted((t, rank, " ".join(_brief(action))) for t, rank, action in log)
        return "\n".join(f"{t / MS:10.3f} ms  rank {rank:2d}  {text}" for t, rank, text in rows)

    def waits_for(self, rank: int) -> set[int]:
        """The ranks without which this one cannot go on."""
        kind, what = self.ranks[rank].blocked or ("", None)
        if kind == "lock":
            holder = self.locks.get(what)
            return {holder} - {rank} if holder is not None and holder >= 0 else set()
        if kind != "meeting":
            return set()
        key, seq = what[:2]
        channel = self.channels[key]
        lacking = {member for member in channel.members if channel.issued.get(member, 0) < seq}
        if channel.jammed == "differ":
            lacking |= channel.calls[channel.completed].keys()
        return lacking

    def in_a_circle(self) -> set[int]:
        """Ranks that wait, at some remove, for themselves."""
        edges = {rank: self.waits_for(rank) for rank, each in enumerate(self.ranks) if each.blocked}
        return {rank for rank in edges if rank in _reached(edges, rank)}

    # -- the scheduler -------------------------------------------------------------------------------------------

    def run(self, until_ns: int | None = None) -> None:
        """Go on until nothing is left to happen, or until a moment."""
        while self._queue and (until_ns is None or self._queue[0][0] <= until_ns):
            self.now_ns, _, rank = heapq.heappop(self._queue)
            if self.now_ns < self.frozen.get(rank, 0):  # its process is stopped
                self._wake(rank, 1 + (self.frozen[rank] - self.now_ns) // self._scale)
            else:
                self._advance(rank)
        if until_ns is not None:
            self.now_ns = max(self.now_ns, until_ns)

    def next_event_ns(self) -> int | None:
        return self._queue[0][0] if self._queue else None

    def _wake(self, rank: int, delay_ns: int) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now_ns + self._scale * delay_ns, self._count, rank))

    def _advance(self, rank: int) -> None:
        me = self.ranks[rank]
        if me.state in ("dead", "failed", "done"):
            return
        if me.blocked is not None:
            self._unblock(rank)
            me.blocked = None
        action = next(me.life, None)
        if action is None:
            self._act(rank)
            self.recorders[rank].done()
            me.state = "done"
            return
        name, *arguments = action
        me.log.append((self.now_ns, action))
        delay_ns = getattr(self, f"_do_{name}")(rank, *arguments)
        if delay_ns is not None:
            self._wake(rank, delay_ns + self._rng.randrange(MS // 4))

    def _unblock(self, rank: int) -> None:
        kind, what = self.ranks[rank].blocked or ("", None)
        if kind == "meeting":
            key, seq, call, ticket = what
            self.channels[key].left[seq - 1].add(rank)
            self.recorders[rank].finish(call, ticket)
        elif kind == "lock":
            self.recorders[rank].local("lock_held", what)

    def _act(self, rank: int) -> None:
        if self.ranks[rank].marked:
            self.acted.add(rank)

    # -- actions: each returns the delay until the next, or None when the rank waits or is gone -------------------

    def _do_phase(self, rank: int, name: str) -> int:
        self.recorders[rank].phase(name)
        return 0

    def _do_step(self, rank: int, step: int, plan: tuple[ScheduleEntry, ...]) -> int:
        self.ranks[rank].step = step
        self.recorders[rank].begin_step(step, plan, 1)
        return 0

    def _do_mark(self, rank: int) -> int:
        self.ranks[rank].marked = True
        return 0

    def _do_sleep(self, rank: int, duration_ns: int) -> int:
        return duration_ns

    def _do_build(self, rank: int, name: str, duration_ns: int) -> int:
        self.recorders[rank].local("build_begin", name)
        self.recorders[rank].local("heartbeat", name)
        return duration_ns

    def _do_heartbeat(self, rank: int, name: str) -> int:
        self.recorders[rank].local("heartbeat", name)
        return 0

    def _do_built(self, rank: int, name: str) -> int:
        self.recorders[rank].local("build_end", name)
        return 0

    def _do_spin(self, rank: int) -> None:
        self.ranks[rank].state = "spinning"

    def _do_kill(self, rank: int) -> None:
        self.ranks[rank].state = "dead"

    def _do_fail(self, rank: int, message: str) -> None:
        self.ranks[rank].state = "failed"
        self.recorders[rank].failed(message)

    def _local(self, rank: int, lock: str) -> str:
        """Locks are files of a host: those made before the run are on every one, others get the host's name."""
        return lock if lock in self._outside else f"{lock}.{rank * self._hosts // self.num_ranks}"

    def _do_lock(self, rank: int, name: str) -> int | None:
        name = self._local(rank, name)
        holder = self.locks.get(name)
        self.recorders[rank].local("lock_wait", name, holder=100 + holder if holder is not None and holder >= 0 else -1)
        self.ranks[rank].blocked = ("lock", name)
        if holder is None:
            self.locks[name] = rank
            return 0
        return None

    def _do_unlock(self, rank: int, name: str) -> int:
        name = self._local(rank, name)
        self.recorders[rank].local("lock_freed", name)
        waiting = [other for other, each in enumerate(self.ranks) if each.blocked == ("lock", name)]
        self.locks[name] = waiting[0] if waiting else None
        if waiting:
            self._wake(waiting[0], MS // 10)
        return 0

    def _do_call(self, rank: int, call: Collective) -> int | None:
        self.recorders[rank].enter(call)
        key, seq = self._join(rank, call)
        return self._block(rank, key, seq, call, 0)

    def _do_issue(self, rank: int, call: Collective, tag: str) -> int:
        ticket = self.recorders[rank].issue(call)
        self.ranks[rank].tickets[tag] = (*self._join(rank, call), call, ticket)
        return 0

    def _do_wait(self, rank: int, tag: str) -> int | None:
        if tag not in self.ranks[rank].tickets:
            return 0
        key, seq, call, ticket = self.ranks[rank].tickets.pop(tag)
        self.recorders[rank].wait(call, ticket)
        return self._block(rank, key, seq, call, ticket)

    def _block(self, rank: int, key: GroupKey, seq: int, call: Collective, ticket: int) -> int | None:
        if self.ranks[rank].state == "dead":
            return None
        self.ranks[rank].blocked = ("meeting", (key, seq, call, ticket or seq))
        channel = self.channels[key]
        served = channel.completed + 1 == seq and rank in channel.served
        return self._latency() if channel.completed >= seq or served else None

    def _latency(self) -> int:
        return self._rng.randrange(MS // 20, MS)

    def _join(self, rank: int, call: Collective) -> tuple[GroupKey, int]:
        self._act(rank)
        members = self._of_rank[rank][call.group]
        key: GroupKey = (call.group, members)
        if call.op in ("send", "recv"):
            ends = (rank, members[call.root]) if call.op == "send" else (members[call.root], rank)
            key = (f"{call.group}:{ends[0]}>{ends[1]}", ends)
        channel = self.channels.setdefault(key, Channel(key[1]))
        seq = channel.join(rank, call, self.ranks[rank].step)
        self._complete(key, channel)
        return key, seq

    def _complete(self, key: GroupKey, channel: Channel) -> None:
        while (meeting := channel.next_meeting()) is not None:
            seq = channel.completed + 1
            if channel.differs():
                channel.jammed = "differ"
                if self._aborts:
                    self.ranks[min(meeting)].state = "dead"
                elif self._one_side:
                    channel.served = channel.largest_side()
                    self._serve(key, seq, channel.served)
                return
            if (key[0], seq) in self._stalls:
                channel.jammed = "stall"
                return
            channel.completed = seq
            self._serve(key, seq, meeting)

    def _serve(self, key: GroupKey, seq: int, ranks: Iterable[int]) -> None:
        """Wake those of the ranks that wait in a meeting."""
        for rank in sorted(ranks):
            blocked = self.ranks[rank].blocked
            if blocked and blocked[0] == "meeting" and blocked[1][:2] == (key, seq):
                self._wake(rank, self._latency())


def _reached(edges: Mapping[int, set[int]], start: int) -> set[int]:
    found: set[int] = set()
    ahead = list(edges[start])
    while ahead:
        rank = ahead.pop()
        if rank not in found:
            found.add(rank)
            ahead += edges.get(rank, ())
    return found


def _brief(action: Action) -> Iterator[str]:
    for part in action:
        if isinstance(part, Collective):
            yield f"{part.group} {part.op} {part.layer} {list(part.sizes)} {part.dtype}"
        elif isinstance(part, tuple):
            yield f"{len(part)} entries"
        else:
            yield str(part)
