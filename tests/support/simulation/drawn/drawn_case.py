"""A drawn run: the program of each simulated rank, step by step, and the fault in it.

``Case.simulate()`` runs the programs until nothing moves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simulator import Action, Simulation

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.trace.knowledge import Knows
from repro.trace.witness.format import Geometry

FOREVER_NS = 10**15
WRAPPING = Geometry(ring_records=40, vector_words=96, string_bytes=16_384, group_slots=16)


@dataclass(frozen=True)
class Item:
    """One collective in the program of one rank, or local work before it."""

    call: Collective | None
    # None: a blocking call; otherwise the rank waits for the call after this many further items
    wait_after: int | None = None
    planned: ScheduleEntry | None = None
    before: tuple[Action, ...] = ()
    after: tuple[Action, ...] = ()
    is_forgotten: bool = False  # the call is issued and never waited for


@dataclass
class Case:
    """One drawn run. ``steps[rank][step]`` is a list of items."""

    seed: int
    fault: str
    num_ranks: int
    groups: dict[str, list[tuple[int, ...]]]
    steps: list[list[list[Item]]]
    declared: bool
    habit: bool  # whether all ranks issue an undeclared collective in every step
    hosts: int
    shape: Geometry
    culprits: tuple[int, ...] = ()
    step: int = -1  # the step with the fault, counted from 0
    stalls: list[tuple[str, int]] = field(default_factory=list)
    locks: dict[str, int] = field(default_factory=dict)
    second: str = ""  # name of a second fault
    victim: int = -1  # the rank that is killed inside a collective
    one_side: bool = False  # whether a meeting whose members differ completes for the largest side
    # whether the judge gets the time of one host only, and derives the others from their wall clocks
    one_clock: bool = False

    @property
    def faults(self) -> set[str]:
        return {self.fault, self.second}

    def programs(self) -> list[list[Action]]:
        return [self._program(rank) for rank in range(self.num_ranks)]

    def _program(self, rank: int) -> list[Action]:
        actions: list[Action] = [("phase", "serve")]
        for number, items in enumerate(self.steps[rank], start=1):
            plan = tuple(item.planned for item in items if item.planned is not None)
            actions.append(("step", number, plan if self.declared else ()))
            pending: dict[int, list[str]] = {}
            for index, item in enumerate(items):
                actions += item.before
                if item.call is not None and item.wait_after is None:
                    actions.append(("call", item.call))
                elif item.call is not None:
                    tag = f"{number}.{index}"
                    actions.append(("issue", item.call, tag))
                    if not item.is_forgotten:
                        pending.setdefault(index + (item.wait_after or 0), []).append(tag)
                actions += [("wait", tag) for tag in pending.pop(index, [])]
                actions += item.after
            actions += [("wait", tag) for tags in pending.values() for tag in tags]
        return actions

    def simulate(
        self,
        until_ns: int | None = None,
        scale: int = 1,
        folder: Path | None = None,
        hidden: Mapping[int, Knows] | None = None,
    ) -> Simulation:
        sim = Simulation(
            self.programs(), self.groups, seed=self.seed, shape=self.shape, hosts=self.hosts, stalls=self.stalls,
            locks=self.locks, aborts="sizes_abort" in self.faults, one_side=self.one_side, scale=scale, folder=folder,
            hidden=hidden,
        )  # fmt: skip
        if self.victim >= 0:
            while (victim := sim.ranks[self.victim]).state == "running":
                moment = sim.next_event_ns()
                if moment is None or (victim.blocked and victim.step >= 1 + self.seed % len(self.steps[0])):
                    victim.state = "dead"
                    break
                sim.run(moment)
        sim.run(until_ns)
        return sim

    def lock_holders(self, sim: Simulation) -> dict[int, tuple[str, int]]:
        """Return what the operating systems of all hosts say about the locks that ranks wait for."""
        known = {} if "unknown_lock" in self.faults else self.locks
        waits = {rank: each.blocked for rank, each in enumerate(sim.ranks) if each.blocked}
        return {rank: (name, known[name]) for rank, (kind, name) in waits.items() if kind == "lock" and name in known}


def pick(case: Case, rng: random.Random, *, group: str | None = None, collective: bool = True) -> tuple[int, int, int]:
    """Return a random (rank, step, index) of an item; of one group if ``group`` is given."""
    places = [
        (rank, step, index)
        for rank, steps in enumerate(case.steps)
        for step, items in enumerate(steps)
        for index, item in enumerate(items)
        if item.call is not None
        and item.planned is not None
        and (group is None or item.call.group == group)
        and (not collective or item.call.group != "pp")
        and len(members_of(case, rank, item.call)) > 1
    ]
    return rng.choice(places)


def members_of(case: Case, rank: int, call: Collective) -> tuple[int, ...]:
    return next(members for members in case.groups[call.group] if rank in members)


def some_of(members: Sequence[int], rng: random.Random, most: int | None = None) -> tuple[int, ...]:
    """Return a random part of the members: at least one, never all."""
    count = rng.randint(1, min(len(members) - 1, most or len(members)))
    return tuple(sorted(rng.sample(list(members), count)))
