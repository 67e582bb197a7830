"""One function for each fault: it changes the programs of some ranks and notes the culprits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from drawn_case import FOREVER_NS, Case, Item, members_of, pick, some_of
from scene import MS
from simulator import Action

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry

MARK: tuple[Action, ...] = (("mark",),)
EXTRA = Collective("dp", "all_reduce", "layers.0.extra", (32,), "int32", "sum")


def _same_place(case: Case, rank: int, step: int, index: int) -> list[int]:
    """Return the ranks whose program has the same planned collective at the same place."""
    call = case.steps[rank][step][index].call
    assert call is not None
    key = _key(case.steps[rank][step][index])
    return [
        other
        for other in members_of(case, rank, call)
        if step < len(case.steps[other])
        and index < len(case.steps[other][step])
        and _key(case.steps[other][step][index]) == key
    ]


def _key(item: Item) -> tuple[ScheduleEntry | None, int | None]:
    return item.planned, item.wait_after


def _extra(case: Case, rng: random.Random, wait_after: int | None = None) -> None:
    numel = rng.choice((8, 32))
    call = EXTRA._replace(group=rng.choice(("dp", "ep")), sizes=(numel,), dtype=rng.choice(("int32", "float32")))
    step = rng.randrange(min(map(len, case.steps)))
    case.step, case.culprits = step, some_of(range(case.num_ranks), rng)
    index = rng.randrange(min(len(case.steps[rank][step]) for rank in case.culprits) + 1)
    for rank in case.culprits:
        case.steps[rank][step].insert(index, Item(call, wait_after, before=MARK))


def _duplicate(case: Case, rng: random.Random) -> None:
    rank, step, index = pick(case, rng)
    item = case.steps[rank][step][index]
    ranks = _same_place(case, rank, step, index)
    case.step = step
    case.culprits = some_of(ranks, rng) if len(ranks) > 1 else (rank,)
    to = rng.randint(0, min(len(case.steps[other][step]) for other in case.culprits))
    for other in case.culprits:
        case.steps[other][step].insert(to, replace(item, planned=None, wait_after=None, before=MARK))


def _skip(case: Case, rng: random.Random, planned: bool = True) -> None:
    rank, step, index = pick(case, rng)
    ranks = _same_place(case, rank, step, index)
    case.step = step
    case.culprits = some_of(ranks, rng, most=3) if len(ranks) > 1 else (rank,)
    for other in case.culprits:
        item = case.steps[other][step][index]
        case.steps[other][step][index] = replace(
            item, call=None, planned=item.planned if planned else None, before=item.before + MARK
        )


def _skip_transfer(case: Case, rng: random.Random) -> None:
    """Leave out one end of a transfer."""
    places = [
        (rank, step, index)
        for rank, steps in enumerate(case.steps)
        for step, items in enumerate(steps)
        for index, item in enumerate(items)
        if item.call is not None and item.call.group == "pp"
    ]
    if not places:
        return
    rank, step, index = rng.choice(places)
    item = case.steps[rank][step][index]
    case.step, case.culprits = step, (rank,)
    case.steps[rank][step][index] = replace(item, call=None, before=item.before + MARK)


def _swap(case: Case, rng: random.Random, planned: bool = False, asynchronous: bool = False) -> None:
    """Exchange two neighbouring items. If no neighbour is suitable at the drawn place, nothing changes."""
    rank, step, index = pick(case, rng)
    items = case.steps[rank][step]
    if index + 1 >= len(items):
        return
    one, two = items[index], items[index + 1]
    if one.call is None or two.call is None or one.planned == two.planned or "pp" in (one.call.group, two.call.group):
        return
    if two.planned is None or len(members_of(case, rank, two.call)) < 2:
        return
    case.culprits = (rank,)
    two = replace(two, before=two.before + MARK)
    if asynchronous:
        one, two = replace(one, wait_after=2), replace(two, wait_after=2)
    if planned:
        items[index], items[index + 1] = two, one
    else:  # the plan keeps its order, so planned items stay where they are
        items[index] = replace(two, planned=one.planned)
        items[index + 1] = replace(one, planned=two.planned)


def _change(case: Case, rng: random.Random, ops: tuple[str, ...], **fields: object) -> None:
    """Change an argument of one rank in a collective that all members call."""
    places = [
        (rank, step, index)
        for rank, steps in enumerate(case.steps)
        for step, items in enumerate(steps)
        for index, item in enumerate(items)
        if item.call is not None and item.call.op in ops and len(members_of(case, rank, item.call)) > 1
    ]
    if not places:
        return
    rank, step, index = rng.choice(places)
    item = case.steps[rank][step][index]
    assert item.call is not None
    if "sizes" in fields:
        sizes = list(item.call.sizes)
        for position in rng.sample(range(len(sizes)), rng.randint(1, len(sizes))):
            sizes[position] += 1 + rng.randrange(3)
        fields = {"sizes": tuple(sizes)}
    case.step, case.culprits = step, (rank,)
    call = item.call._replace(**fields)  # type: ignore[arg-type]
    case.steps[rank][step][index] = replace(item, call=call, before=item.before + MARK)


def _habit(case: Case, rng: random.Random) -> None:
    """Let all ranks issue an extra collective in every step, and only some in the last step.

    These are the wrong ones.
    """
    live = case.culprits = some_of(range(case.num_ranks), rng)
    for rank, steps in enumerate(case.steps):
        if rank in live:
            steps[-1] = [item if item.planned else replace(item, before=item.before + MARK) for item in steps[-1]]
        else:
            steps[-1] = [item for item in steps[-1] if item.planned]


def _insert(case: Case, rng: random.Random, *actions: Action) -> None:
    """Insert local work at a random place of one rank."""
    rank = rng.randrange(case.num_ranks)
    step = rng.randrange(len(case.steps[rank]))
    index = rng.randrange(len(case.steps[rank][step]))
    item = case.steps[rank][step][index]
    case.culprits = (rank,)
    case.steps[rank][step][index] = replace(item, before=(*item.before, *actions))


def _lock(case: Case, rng: random.Random) -> None:
    """Let one rank hold a lock while it enters a collective that another rank reaches only after that lock."""
    rank, step, index = pick(case, rng)
    item = case.steps[rank][step][index]
    assert item.call is not None
    others = [other for other in _same_place(case, rank, step, index) if other != rank]
    if not others:
        return
    case.steps[rank][step][index] = replace(
        item, before=(*item.before, ("lock", "build")), after=(("unlock", "build"), *item.after)
    )
    other = rng.choice(others)
    theirs = case.steps[other][step][index]
    wait = rng.choice((20 * MS, 20 * MS, 0))
    case.steps[other][step][index] = replace(
        theirs, before=(*theirs.before, ("sleep", wait), ("lock", "build"), ("unlock", "build"))
    )
    case.culprits = (rank,)


def _outside_lock(pid: int) -> Callable[[Case, random.Random], None]:
    def inject(case: Case, rng: random.Random) -> None:
        case.locks["outside"] = pid
        _insert(case, rng, ("lock", "outside"))
        case.culprits = ()

    return inject


def _early_done(case: Case, rng: random.Random) -> None:
    rank = rng.randrange(case.num_ranks)
    case.culprits = (rank,)
    del case.steps[rank][rng.randrange(1, len(case.steps[rank])) :]


def _stall(case: Case, rng: random.Random) -> None:
    case.stalls.append((rng.choice(("dp", "ep")), rng.randint(1, 6)))


def _kill_inside(case: Case, rng: random.Random) -> None:
    case.victim = rng.randrange(case.num_ranks)
    case.culprits = (case.victim,)


def _late_starter(case: Case, rng: random.Random) -> None:
    _insert(case, rng, ("sleep", FOREVER_NS))


INJECTIONS: dict[str, Callable[[Case, random.Random], None]] = {
    "none": lambda case, rng: None,
    "extra": _extra,
    "extra_async": lambda case, rng: _extra(case, rng, wait_after=rng.randrange(4)),
    "duplicate": _duplicate,
    "skip": _skip,
    "transfer_skip": _skip_transfer,
    "transfer_dtype": lambda case, rng: _change(case, rng, ("send", "recv"), dtype="int32"),
    "swap": _swap,
    "swap_async": lambda case, rng: _swap(case, rng, asynchronous=True),
    "replace": lambda case, rng: _change(case, rng, ("all_reduce",), op="all_to_all", reduce_op=""),
    "habit": _habit,
    "plan_swap": lambda case, rng: _swap(case, rng, planned=True),
    "plan_skip": lambda case, rng: _skip(case, rng, planned=False),
    "dtype": lambda case, rng: _change(case, rng, ("all_reduce", "all_gather_v"), dtype="int32"),
    "reduce_op": lambda case, rng: _change(case, rng, ("all_reduce", "reduce_scatter_v"), reduce_op="max"),
    "root": lambda case, rng: _change(case, rng, ("broadcast",), root=1),
    "numel": lambda case, rng: _change(case, rng, ("all_reduce", "broadcast"), sizes=()),
    "sizes": lambda case, rng: _change(case, rng, ("all_gather_v", "reduce_scatter_v"), sizes=()),
    "sizes_abort": lambda case, rng: _change(case, rng, ("all_gather_v", "reduce_scatter_v"), sizes=()),
    "early_done": _early_done,
    "lock": _lock,
    "stale_lock": _outside_lock(0),
    "held_lock": _outside_lock(77),
    "unknown_lock": _outside_lock(77),
    "kill": lambda case, rng: _insert(case, rng, ("kill",)),
    "kill_inside": _kill_inside,
    "fail": lambda case, rng: _insert(case, rng, ("fail", "no more")),
    "spin": lambda case, rng: _insert(case, rng, ("spin",)),
    "stall": _stall,
    "straggler": _late_starter,
    "builder": lambda case, rng: _insert(case, rng, ("build", "gdn", FOREVER_NS), ("built", "gdn")),
    "late_starter": lambda case, rng: _insert(case, rng, ("sleep", FOREVER_NS)),
}
