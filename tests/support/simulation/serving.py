"""Eight ranks that serve: the collectives of a step, and the verdict on a scene of these ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scene import Scene
from sentences import check_sentences
from worlds import Witnessed

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.verdict import Facts, Verdict, judge

EVERYONE = range(8)
C1 = Collective("dp", "all_reduce", "", (32,), "int32", "sum")
EXTRA = Collective("dp", "all_reduce", "layers.0.linear_attn", (32,), "int32", "sum")
SIZES = (4, 4, 4, 4, 4, 4, 1, 1)


def dispatch(layer: int) -> Collective:
    return Collective("ep", "all_gather_v", f"layers.{layer}.mlp", SIZES, "float32")


def combine(layer: int) -> Collective:
    return Collective("ep", "reduce_scatter_v", f"layers.{layer}.mlp", SIZES, "float32", "sum")


STEP = [C1, dispatch(0), combine(0), dispatch(1), combine(1)]
PLAN = tuple(ScheduleEntry(call.group, call.op, call.layer) for call in STEP)


def eight_ranks(**more: Any) -> Scene:
    made = Scene(8, {"dp": EVERYONE, "ep": EVERYONE}, **more)
    made.phase("serve")
    return made


def whole_step(made: Scene, step: int, *, plan: tuple[ScheduleEntry, ...] = PLAN, extra: bool = False) -> None:
    made.begin_step(step, plan, live=EVERYONE)
    for call in STEP:
        if extra and call == dispatch(0):
            made.all_of(EVERYONE, EXTRA)
        made.all_of(EVERYONE, call)


def look(
    made: Scene, *, after_s: float = 2.0, wrong_numbers: Sequence[str] = (), queued: Sequence[str] = (), **facts: Any
) -> Verdict:
    """Return the verdict on a scene ``after_s`` after its last event, with a quiet window of 1 s.

    Checks its sentences.
    """
    now_ns, witnesses = made.now_ns + int(after_s * 1e9), made.witnesses()
    verdict = judge(
        witnesses, Facts(**facts), num_ranks=made.num_ranks, now_ns=now_ns, quiet_window_s=1.0,
        wrong_numbers=wrong_numbers, queued=queued,
    )  # fmt: skip
    check_sentences(verdict, Witnessed(verdict, witnesses))
    return verdict


def held(lock: str, pid: int, ranks: Iterable[int] = EVERYONE) -> dict[int, tuple[str, int]]:
    """Return what the operating system says about a lock for which ``ranks`` wait."""
    return dict.fromkeys(ranks, (lock, pid))


def metadata_rebuild(**more: Any) -> Scene:
    """Make ranks with live requests issue one extra dp all_reduce inside layer 0. Before step 12 all ranks did so."""
    made = eight_ranks(**more)
    for step in range(10, 12):
        whole_step(made, step, extra=True)
    made.begin_step(12, PLAN, live=range(6))
    made.all_of(EVERYONE, C1)
    made.enter(range(6), EXTRA)
    made.enter((6, 7), dispatch(0))
    return made
