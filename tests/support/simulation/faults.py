"""Random programs for simulated ranks, one fault in each, and the truth about how that ends.

``draw(seed)`` makes a :class:`Case`; ``Case.simulate()`` runs it to rest; ``truth(case, sim)`` says what a perfect
observer would: class, culprits, and whether a witness can show the culprit at all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scene import MS, SMALL
from simulator import Action, Simulation

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.trace.knowledge import Knows
from repro.trace.witness.format import Geometry

# Off the declared schedule: the witnesses show who did it.
OFF_PLAN = ("extra", "extra_async", "duplicate", "skip", "swap", "swap_async", "replace", "habit", "transfer_skip")
# By the declared schedule or in the arguments: they show only who differs.
SILENT = ("plan_swap", "plan_skip", "dtype", "reduce_op", "root", "numel", "sizes", "sizes_abort", "early_done")
SILENT += ("transfer_dtype",)
OTHER = ("none", "lock", "stale_lock", "held_lock", "unknown_lock", "kill", "kill_inside", "fail", "spin", "stall")
LATE = ("straggler", "builder", "late_starter")
FAULTS = OFF_PLAN + SILENT + OTHER + LATE

FOREVER_NS = 10**15
WRAPPING = Geometry(ring_records=40, vector_words=96, string_bytes=16_384, group_slots=16)


@dataclass(frozen=True)
class Item:
    """One collective in the program of one rank, or something local before it."""

    call: Collective | None
    wait_after: int | None = None  # None: blocking; else issued, and waited for after that many more items
    planned: ScheduleEntry | None = None
    before: tuple[Action, ...] = ()
    after: tuple[Action, ...] = ()
    is_forgotten: bool = False  # issued, and never waited for


@dataclass
class Case:
    """One drawn run: ``steps[rank][step]`` is a list of items."""

    seed: int
    fault: str
    num_ranks: int
    groups: dict[str, list[tuple[int, ...]]]
    steps: list[list[list[Item]]]
    declared: bool
    habit: bool  # all ranks issue an undeclared collective in every step
    hosts: int
    shape: Geometry
    culprits: tuple[int, ...] = ()
    step: int = -1  # where the fault is, counted from 0
    stalls: list[tuple[str, int]] = field(default_factory=list)
    locks: dict[str, int] = field(default_factory=dict)
    second: str = ""  # another fault
    victim: int = -1  # of a kill inside a collective
    one_side: bool = False  # the backend completes a meeting whose members differ for the largest side
    one_clock: bool = False  # judged by the time of one host; that of the others follows from their wall clocks

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
        """What the systems of all hosts say about the locks that ranks wait for."""
        known = {} if "unknown_lock" in self.faults else self.locks
        waits = {rank: each.blocked for rank, each in enumerate(sim.ranks) if each.blocked}
        return {rank: (name, known[name]) for rank, (kind, name) in waits.items() if kind == "lock" and name in known}


@dataclass(frozen=True)
class Truth:
    verdict: str
    culprits: tuple[int, ...] = ()
    provable: bool = True  # the witnesses show the culprit


def truth(case: Case, sim: Simulation) -> Truth:
    """What became of the run, from the scheduler's own state."""
    stuck = [rank for rank, each in enumerate(sim.ranks) if each.blocked and each.state == "running"]
    states = {each.state for each in sim.ranks}
    wrapped = case.shape is WRAPPING
    culprits = case.culprits
    if case.fault in OFF_PLAN:
        culprits = tuple(rank for rank in culprits if rank in sim.acted)
    provable = case.fault not in SILENT and (case.declared or case.fault == "lock") and not wrapped
    if case.habit and case.step == 0:
        provable = False  # who leaves the schedule by habit is not known before there is one
    if _mispaired(sim):
        return Truth("corrupt", culprits, provable)
    if case.fault in LATE and stuck:
        return Truth("slow", case.culprits)
    if states == {"done"}:
        return Truth("clean")
    if "spinning" in states:
        return Truth("slow", case.culprits)
    if case.fault == "sizes_abort" and "dead" in states:
        return Truth("crash", case.culprits, False)
    if {"dead", "failed"} & states:
        return Truth("crash", case.culprits)
    if any(channel.jammed == "stall" for channel in sim.channels.values()):
        return Truth("stall")
    if case.fault == "held_lock":
        return Truth("slow")
    if case.fault == "unknown_lock":
        return Truth("inconclusive")
    if case.fault == "stale_lock":
        return Truth("deadlock")
    return Truth("deadlock", culprits, provable)


def class_of(case: Case, sim: Simulation) -> str:
    """What became of a run with any number of faults, from the scheduler's own state alone."""
    states = {rank: each.state for rank, each in enumerate(sim.ranks)}
    waited_for = {other for rank, each in enumerate(sim.ranks) if each.blocked for other in sim.waits_for(rank)}
    aborted = any(
        channel.jammed == "differ" and states[rank] in ("dead", "failed")
        for channel in sim.channels.values()
        for rank in {*channel.members} - channel.served
    )
    if _mispaired(sim):
        return "corrupt"
    if set(states.values()) == {"done"}:
        return "clean"
    differ = any(  # whether the device or the difference holds them up, nobody could tell
        channel.jammed == "stall" and len({call for call, _ in channel.calls[channel.completed].values()}) > 1
        for channel in sim.channels.values()
    )
    if (sim.in_a_circle() and not aborted) or differ:
        return "deadlock"
    if {"dead", "failed"} & set(states.values()):
        return "crash"
    if any(states[rank] == "done" for rank in waited_for):
        return "deadlock"
    moving = {rank for rank, each in enumerate(sim.ranks) if not each.blocked and states[rank] != "done"}
    if moving & waited_for:
        return "slow"
    if any(each.blocked and each.blocked[0] == "lock" and (sim.locks[each.blocked[1]] or 0) < 0 for each in sim.ranks):
        pid = next(iter(case.locks.values()))
        return "inconclusive" if "unknown_lock" in case.faults else "slow" if pid else "deadlock"
    return "slow" if moving and not any(c.jammed == "stall" for c in sim.channels.values()) else "stall"


def _mispaired(sim: Simulation) -> bool:
    """Whether a meeting was completed, on both sides, by ranks that meant different collectives."""
    for channel in sim.channels.values():
        for number, meeting in enumerate(channel.calls):
            left = set().union(*channel.left[number:])  # who is through with a later one, is through with this
            if left:
                left |= {rank for rank in meeting if sim.ranks[rank].state == "done"}  # it never waited for it
            sides = {
                (call._replace(op="", root=0, layer=""), 0) if call.op in ("send", "recv") else (call, step)
                for rank, (call, step) in meeting.items()
                if rank in left
            }
            if len(sides) > 1:
                return True
    return False


def draw(seed: int, fault: str | None = None, rng: random.Random | None = None) -> Case:
    """The case of a seed, or one that ``rng`` decides on; the seed then only times it."""
    rng = rng or random.Random(seed)
    fault = fault or rng.choice(FAULTS)
    num_ranks = rng.choice((2, 3, 4, 4, 5, 6, 8, 8, 8, 12, 16)) if rng.random() < 0.97 else rng.randint(17, 64)
    everyone = tuple(range(num_ranks))
    groups = {"dp": [everyone], "ep": [everyone]}
    if rng.random() < 0.4:
        size = rng.choice((2, 3, 4))
        groups["tp"] = [everyone[i : i + size] for i in range(0, num_ranks, size)]
    if rng.random() < 0.3 or fault.startswith("transfer"):
        groups["pp"] = [everyone]
    # A duplicate before a habitual extra looks like that extra where it was not shared, and is: the schedule decides.
    habit = fault == "habit" or (rng.random() < 0.15 and fault != "duplicate")
    declared, hosts = rng.random() < 0.85, min(num_ranks, rng.choice((1, 1, 1, 2, 2, 3, 4)))
    shape = WRAPPING if rng.random() < 0.1 else SMALL
    case = Case(seed, fault, num_ranks, groups, [[] for _ in everyone], declared, habit, hosts, shape)
    case.one_clock = rng.random() < 0.5
    constant = rng.random() < 0.7
    template = _template(rng, groups)
    for number in range(rng.randint(2, 5)):
        if number and not constant:
            template = _template(rng, groups)
        _append_step(case, template, rng)
    if case.habit:
        call = Collective("dp", "all_reduce", "layers.0.linear_attn", (32,), "int32", "sum")
        for steps in case.steps:
            for items in steps:
                items.insert(1, Item(call))
    _local_work(case, rng)
    _inject(case, rng, fault)
    _forget(case, random.Random(seed + 1))
    case.one_side = random.Random(seed + 2).random() < 0.3
    return case


def _forget(case: Case, rng: random.Random) -> None:
    """Now and then a rank never waits for some of what it issues, which is legal: the backend completes it."""
    if rng.random() < 0.3:
        rank = rng.randrange(case.num_ranks)
        for items in case.steps[rank]:
            items[:] = [replace(item, is_forgotten=rng.random() < 0.5) for item in items]


SECOND = ("extra", "extra_async", "skip", "swap", "replace", "dtype", "sizes", "lock", "kill", "kill_inside", "fail")
SECOND += ("spin", "stall", "straggler", "builder", "early_done", "stale_lock", "held_lock")


def draw_pair(seed: int) -> Case:
    """A case with two faults that know nothing of each other; ``culprits`` are those of both."""
    rng = random.Random(~seed)
    case = draw(seed, rng.choice([fault for fault in FAULTS if fault not in ("none", "habit")]))
    first = case.culprits
    case.second = rng.choice([fault for fault in SECOND if "_lock" not in fault or not case.locks])
    _inject(case, rng, case.second)
    case.culprits = tuple(sorted({*first, *case.culprits}))
    return case


def _template(rng: random.Random, groups: dict[str, list[tuple[int, ...]]]) -> list[tuple[str, str, str, int | None]]:
    """(group, op, layer, wait_after) of each collective of a step; "dp all_reduce" first, as an engine does."""
    entries: list[tuple[str, str, str, int | None]] = [("dp", "all_reduce", "", None)]
    for layer in range(rng.randint(1, 4)):
        if rng.random() < 0.15:  # coalesced: issued one after the other, then waited for in turn
            group, number = rng.choice(sorted(set(groups) - {"pp"})), rng.randint(2, 3)
            ops = rng.sample(("all_reduce", "broadcast", "all_gather_v", "reduce_scatter_v"), number)
            entries += [(group, op, f"layers.{layer}.kv", number - 1 - index) for index, op in enumerate(ops)]
        for _ in range(rng.randint(1, 3)):
            group = rng.choice(sorted(groups))
            ops = ("transfer",) if group == "pp" else ("all_reduce", "broadcast", "all_gather_v", "reduce_scatter_v")
            wait_after = rng.choice((0, 1, 2, 3)) if rng.random() < 0.25 and group != "pp" else None
            entries.append((group, rng.choice(ops), f"layers.{layer}.mlp", wait_after))
    return list({entry[:3]: entry for entry in entries}.values())  # equal entries of a schedule cannot be distinguished


def _append_step(case: Case, template: list[tuple[str, str, str, int | None]], rng: random.Random) -> None:
    new: list[list[Item]] = [[] for _ in case.steps]
    for group, op, layer, wait_after in template:
        numel = rng.choice((8, 32))
        pairs = _pairs(case.num_ranks, rng) if op == "transfer" else []
        for members in case.groups[group]:
            sizes = tuple(rng.randint(0, 9) for _ in members) if op.endswith("_v") else (numel,)
            reduce_op = "sum" if "reduce" in op else ""
            for rank in members if op != "transfer" else ():
                call = Collective(group, op, layer, sizes, "float32", reduce_op, 0 if op == "broadcast" else -1)
                new[rank].append(_item(call, wait_after))
        for source, target in pairs:
            new[source].append(_item(Collective(group, "send", layer, (numel,), "float32", "", target)))
            new[target].append(_item(Collective(group, "recv", layer, (numel,), "float32", "", source)))
    for rank, items in enumerate(new):
        case.steps[rank].append(items)


def _pairs(num_ranks: int, rng: random.Random) -> list[tuple[int, int]]:
    """Transfers in one order on all ranks, so that they cannot lock each other."""
    order = list(range(num_ranks))
    rng.shuffle(order)
    return list(itertools.pairwise(order[:5]))


def _item(call: Collective, wait_after: int | None = None) -> Item:
    return Item(call, wait_after, ScheduleEntry(call.group, call.op, call.layer))


def _local_work(case: Case, rng: random.Random) -> None:
    """Sleeps, builds and short critical sections, all legal."""
    for steps in case.steps:
        for items in steps:
            for index, item in enumerate(items):
                if rng.random() < 0.08:
                    work = rng.choice(
                        [
                            (("sleep", rng.randrange(5 * MS)),),
                            (("build", "gdn", rng.randrange(5 * MS)), ("built", "gdn")),
                            (("lock", "cache"), ("build", "gdn", MS), ("built", "gdn"), ("unlock", "cache")),
                        ]
                    )
                    items[index] = replace(item, before=work + item.before)


def _inject(case: Case, rng: random.Random, fault: str) -> None:
    from injections import INJECTIONS

    INJECTIONS[fault](case, rng)


def pick(case: Case, rng: random.Random, *, group: str | None = None, collective: bool = True) -> tuple[int, int, int]:
    """A random (rank, step, index) of an item, of one group if asked."""
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
    """A part of the members: at least one, never all."""
    count = rng.randint(1, min(len(members) - 1, most or len(members)))
    return tuple(sorted(rng.sample(list(members), count)))
