"""A watcher and its agents on the hosts of a simulation, which supplies their clocks, processes and locks."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator import Simulation

from repro.hosts import locks
from repro.hosts.agent import POLL_S, HostAgent
from repro.hosts.host import Host
from repro.hosts.options import WatchOptions
from repro.store.run_dir import PARTS, RunDir
from repro.trace.witness.format import Identity, pack_header
from repro.trace.witness.parse import parse_header
from repro.watch.live import Watch


@dataclass(frozen=True)
class SimulatedProcess:
    """The process of a rank, as a simulated watcher sees it."""

    pid: int
    world: World

    def suspend(self) -> None:
        """Do nothing, because the simulation stands still while processes are ended."""

    def kill(self) -> None:
        self.world.sim.ranks[self.pid - 100].state = "dead"

    def status(self) -> str:
        return "dead" if self.world.sim.ranks[self.pid - 100].state == "dead" else "sleeping"


class SimulatedHost(Host):
    """Host number ``index`` of a simulation.

    look_s    seconds that it takes to look at one process
    starved   share of the time in which its ranks are ready to run but have no processor
    late_s    seconds by which a sleeping process is woken too late
    """

    def __init__(self, world: World, index: int) -> None:
        sim = world.sim
        offset_ns = 10**16 + sim.skews_ns[index]
        wall_ns = 10**18 - offset_ns - sim.wall_errors_ns[index]
        self.here = Identity(0, 1, hostname=f"host{index}", boot_id=f"boot{index}", wall_offset_ns=wall_ns)
        self.index = index
        self._world, self._offset_ns = world, offset_ns
        self.look_s = self.starved = self.late_s = 0.0
        self.holders: dict[str, int] = {}
        self.asked: list[dict[int, int]] = []

    def now_ns(self) -> int:
        return self._world.sim.now_ns + self._offset_ns

    def sleep(self, duration_s: float) -> None:
        self._world.advance(duration_s + self.late_s)

    def find(self, writer: Identity) -> Any:
        if self.look_s:
            self._world.advance(self.look_s)
        return SimulatedProcess(writer.pid, self._world) if self._world.sim.ranks[writer.rank].state != "dead" else None

    def is_stopped(self, found: Any) -> bool:
        return self._world.sim.frozen.get(found.pid - 100, 0) > self._world.sim.now_ns

    def cpu_seconds(self, pids: Iterable[int]) -> dict[int, float]:
        return {pid: self._world.busy_s[pid - 100] for pid in pids}

    def starved_seconds(self, pid: int) -> float:
        return self.starved * self._world.sim.now_ns / 1e9

    def stolen_seconds(self) -> float:
        return 0.0

    def lock_holder(self, name: str, waiting: Collection[int]) -> int:
        if name in self.holders:
            return self.holders[name]
        holder = self._world.sim.locks.get(name)
        if holder is None:
            return locks.NOBODY
        return 100 + holder if holder >= 0 else locks.UNKNOWN

    def with_ancestors(self, pid: int) -> list[int]:
        return [pid]

    def describe(self, pid: int) -> str:
        return f"process {pid} runs"

    def collect(self, run_dir: RunDir, pids: Mapping[int, int]) -> dict[int, str]:
        self.asked.append(dict(pids))
        if self.index == 0:
            self._world.advance(0.05)
        return {rank: "stack" for rank in pids if self.is_stopped(SimulatedProcess(pids[rank], self._world))}


@dataclass
class World:
    """The hosts of a simulation, the watcher on host 0, and an agent on some of the other hosts.

    silent_ns   host -> time from which its agent reports nothing more
    late_s      host -> by how many seconds the time between two looks of its agent exceeds POLL_S
    """

    sim: Simulation
    run_dir: RunDir
    options: WatchOptions
    num_hosts: int
    silent_ns: dict[int, int] = field(default_factory=dict)
    late_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.busy_s = [0.0] * self.sim.num_ranks
        self.hosts = [SimulatedHost(self, index) for index in range(self.num_hosts)]
        self._agents: dict[int, HostAgent] = {}
        self._next_ns: dict[int, int] = {}
        self._polling = False

    def add_agents(self, hosts: Iterable[int]) -> None:
        """Start the agents of these hosts."""
        self.run_dir.agents.mkdir(exist_ok=True)
        for index in hosts:
            self._agents[index] = self.agent(index)
            self._next_ns[index] = self.sim.now_ns

    def watch(self, **more: Any) -> Watch:
        """Return the watcher."""
        more.setdefault("job_alive", lambda: any(each.state != "dead" for each in self.sim.ranks))
        return Watch(self.run_dir, self.options, host=self.hosts[0], **more)

    def agent(self, index: int) -> HostAgent:
        """Return the agent of a host."""
        first = next(r for r in range(self.sim.num_ranks) if r * self.num_hosts // self.sim.num_ranks == index)
        return HostAgent(self.run_dir, self.options, first, self.hosts[index])

    def advance(self, duration_s: float) -> None:
        """Let time pass. Agents look when their next look is due."""
        until_ns = self.sim.now_ns + int(duration_s * 1e9)
        while not self._polling and self._next_ns and (soonest := min(self._next_ns.values())) <= until_ns:
            self._go_on(max(soonest, self.sim.now_ns))
            index = min(self._next_ns, key=lambda host: self._next_ns[host])
            self._next_ns[index] = self.sim.now_ns + int((POLL_S + self.late_s.get(index, 0.0)) * 1e9)
            if self.sim.now_ns >= self.silent_ns.get(index, 1 << 62):
                del self._next_ns[index]
                continue
            self._polling = True
            self._agents[index].poll()
            self._polling = False
        self._go_on(max(until_ns, self.sim.now_ns))

    def _go_on(self, until_ns: int) -> None:
        working = [not each.blocked and each.state in ("running", "spinning") for each in self.sim.ranks]
        passed_s = (until_ns - self.sim.now_ns) / 1e9
        self.busy_s = [busy + passed_s * works for busy, works in zip(self.busy_s, working, strict=True)]
        self.sim.run(until_ns)


def make_run_dir(root: Path) -> RunDir:
    """Make an empty run directory."""
    for part in PARTS:
        (root / part).mkdir(parents=True)
    return RunDir(root)


def move_to_another_machine(run_dir: RunDir, rng: random.Random) -> None:
    """Change the names of hosts and boots in witnesses and verdict, as a bundle does."""
    names: dict[str, str] = {}

    def rename(name: str) -> str:
        return names.setdefault(name, f"other-{len(names)}-{rng.randrange(1000)}")

    for path in run_dir.root.glob("events/*.wit"):
        data = bytearray(path.read_bytes())
        writer, shape = parse_header(bytes(data), path.name)
        writer = dataclasses.replace(writer, hostname=rename(writer.hostname), boot_id=rename(writer.boot_id))
        header = pack_header(writer, shape)
        data[: len(header)] = header
        path.write_bytes(data)
    document = json.loads(run_dir.verdict.read_text())
    watcher = document["watcher"]
    watcher["hostname"], watcher["boot_id"] = rename(watcher["hostname"]), rename(watcher["boot_id"])
    run_dir.verdict.write_text(json.dumps(document))
