"""Draw random programs for simulated ranks, with one fault or two in each: ``draw(seed)`` makes a :class:`Case`."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from drawn_case import WRAPPING, Case, Item
from injections import INJECTIONS
from scene import MS, SMALL

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry

# Faults in which a rank leaves its declared schedule: the witnesses show which rank did it.
OFF_PLAN = ("extra", "extra_async", "duplicate", "skip", "swap", "swap_async", "replace", "habit", "transfer_skip")
# Faults in the declared schedule or in the arguments: the witnesses show only which ranks differ.
SILENT = ("plan_swap", "plan_skip", "dtype", "reduce_op", "root", "numel", "sizes", "sizes_abort", "early_done")
SILENT += ("transfer_dtype",)
OTHER = ("none", "lock", "stale_lock", "held_lock", "unknown_lock", "kill", "kill_inside", "fail", "spin", "stall")
LATE = ("straggler", "builder", "late_starter")
FAULTS = OFF_PLAN + SILENT + OTHER + LATE


def draw(seed: int, fault: str | None = None, rng: random.Random | None = None) -> Case:
    """Return the case of a seed. If ``rng`` is given, it decides on the case, and the seed only on its times."""
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
    # A duplicate before a habitual extra collective looks like that extra one. The schedule decides which of the two it
    # is.
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
    INJECTIONS[fault](case, rng)
    _forget(case, random.Random(seed + 1))
    case.one_side = random.Random(seed + 2).random() < 0.3
    return case


def _forget(case: Case, rng: random.Random) -> None:
    """Let some ranks never wait for some of their calls. This is legal: the backend completes the calls."""
    if rng.random() < 0.3:
        rank = rng.randrange(case.num_ranks)
        for items in case.steps[rank]:
            items[:] = [replace(item, is_forgotten=rng.random() < 0.5) for item in items]


SECOND = ("extra", "extra_async", "skip", "swap", "replace", "dtype", "sizes", "lock", "kill", "kill_inside", "fail")
SECOND += ("spin", "stall", "straggler", "builder", "early_done", "stale_lock", "held_lock")


def draw_pair(seed: int) -> Case:
    """Return a case with two independent faults. ``culprits`` has the culprits of both."""
    rng = random.Random(~seed)
    case = draw(seed, rng.choice([fault for fault in FAULTS if fault not in ("none", "habit")]))
    first = case.culprits
    case.second = rng.choice([fault for fault in SECOND if "_lock" not in fault or not case.locks])
    INJECTIONS[case.second](case, rng)
    case.culprits = tuple(sorted({*first, *case.culprits}))
    return case


def _template(rng: random.Random, groups: dict[str, list[tuple[int, ...]]]) -> list[tuple[str, str, str, int | None]]:
    """Return (group, op, layer, wait_after) of each collective of a step.

    As in an engine, "dp all_reduce" comes first.
    """
    entries: list[tuple[str, str, str, int | None]] = [("dp", "all_reduce", "", None)]
    for layer in range(rng.randint(1, 4)):
        if rng.random() < 0.15:  # coalesced calls: issued one after the other, then waited for in turn
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
    """Return transfers in one order for all ranks, so that they cannot block each other."""
    order = list(range(num_ranks))
    rng.shuffle(order)
    return list(itertools.pairwise(order[:5]))


def _item(call: Collective, wait_after: int | None = None) -> Item:
    return Item(call, wait_after, ScheduleEntry(call.group, call.op, call.layer))


def _local_work(case: Case, rng: random.Random) -> None:
    """Add sleeps, builds and short critical sections, all of which are legal."""
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
