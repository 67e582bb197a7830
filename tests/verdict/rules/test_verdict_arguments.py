"""The verdict on ranks whose collectives differ in operation, type, size or root, and on transfers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from scene import SMALL, Scene
from serving import C1, EVERYONE, EXTRA, PLAN, STEP, dispatch, eight_ranks, look, whole_step

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry


def test_different_operations_under_one_number_are_a_mismatch() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(range(7), dispatch(0))
    made.enter([7], Collective("ep", "broadcast", "layers.0.mlp", (4,), "float32", root=0))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "mismatch", (7,))


def test_a_stale_size_vector_is_found_by_what_the_others_say_of_themselves() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(range(1, 8), dispatch(0))
    made.enter([0], Collective("ep", "all_gather_v", "layers.0.mlp", (4, 4, 9, 4, 4, 4, 1, 1), "float32"))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "sizes", (0,))
    verdict = look(made, alive={3: False})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "sizes", (0,))


def test_an_extra_collective_that_pairs_silently_is_corrupt() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN, live=[0])
    made.all_of(EVERYONE, C1)
    made.enter([0], EXTRA)
    for call in STEP[1:]:
        made.all_of(range(1, 8), call)
    made.begin_step(3, PLAN, ranks=range(1, 8))
    made.all_of(range(1, 8), C1)
    made.leave([0], EXTRA)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("corrupt", "extra", (0,))


def test_sizes_that_differ_because_one_side_is_a_call_ahead_are_an_order_without_a_culprit() -> None:
    """Without declared schedules nothing shows who left a call out; which call pairs with which is shown."""

    def gather(layer: int, rows: int) -> Collective:
        return Collective("ep", "all_gather_v", f"layers.{layer}.mlp", (rows,) * 4, "float32")

    made = Scene(4, {"ep": range(4)})
    made.all_of(range(3), gather(0, 4))
    made.enter([3], gather(1, 5))
    made.enter(range(3), gather(1, 5))
    verdict = look(made)
    assert (verdict.cause, verdict.culprits) == ("order", ()), verdict
    assert "ranks 0-2 issued as #2 what others issued as #1" in verdict.evidence, verdict.evidence


def transfer(op: str, peer: int, **more: Any) -> Collective:
    return Collective("pp", op, "layers.0.mlp", (8,), "float32", "", peer)._replace(**more)


def pipeline() -> Scene:
    made = Scene(4, {"pp": range(4)})
    for rank in range(4):
        first, second = ("send", "recv") if rank % 2 == 0 else ("recv", "send")
        plan = tuple(ScheduleEntry("pp", op, "layers.0.mlp") for op in (first, second))
        made.begin_step(1, plan, ranks=[rank])
    return made


def test_two_ranks_that_both_send_first_are_a_deadlock_of_who_left_its_schedule() -> None:
    made = pipeline()
    made.enter([0], transfer("send", 1))
    made.enter([1], transfer("send", 0))
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("deadlock", (1,)), verdict
    assert {link["waits_in"] for link in verdict.cycle} == {"pp:0>1 send #1", "pp:1>0 send #1"}
    made = pipeline()
    made.enter([0], transfer("send", 1))
    made.enter([1], transfer("recv", 0))
    assert look(made).verdict == "stall"
    made.leave([0], transfer("send", 1))
    made.leave([1], transfer("recv", 0))
    made.enter([0], transfer("recv", 1))
    assert (look(made).verdict, look(made).culprits) == ("slow", (1,))


def test_a_transfer_whose_ends_differ_is_a_mismatch() -> None:
    made = pipeline()
    made.enter([0], transfer("send", 1))
    made.enter([1], transfer("recv", 0, dtype="int32"))
    assert (look(made).verdict, look(made).cause, look(made).culprits) == ("deadlock", "mismatch", ())
    made.leave([0], transfer("send", 1))
    made.leave([1], transfer("recv", 0, dtype="int32"))
    assert look(made).verdict == "corrupt"


SUM = Collective("world", "all_reduce", "x", (4,), "float32", "sum")
BROADCAST = Collective("world", "broadcast", "x", (4,), "float32", "", 0)


@pytest.mark.parametrize(
    ("most", "one", "cause"),
    [
        (SUM, SUM._replace(sizes=(8,)), "sizes"),
        (SUM, SUM._replace(reduce_op="max"), "mismatch"),
        (SUM, SUM._replace(dtype="float64"), "mismatch"),
        (SUM, SUM._replace(op="all_gather", reduce_op=""), "mismatch"),
        (BROADCAST, BROADCAST._replace(root=1), "mismatch"),
    ],
)
@pytest.mark.parametrize("then", ["next", "done", "caught"])
def test_arguments_that_differ_are_named_where_only_one_side_completed_the_collective(
    most: Collective, one: Collective, cause: str, then: str
) -> None:
    """As gloo completes a meeting for ranks 0, 2 and 3, and never for rank 1."""
    made = Scene(4, {"world": range(4)})
    made.enter((0, 2, 3), most)
    made.enter((1,), one)
    made.leave((0, 2, 3), most)
    if then == "next":
        made.enter((0, 2, 3), SUM)
    else:
        for rank in (0, 2, 3) if then == "done" else range(4):
            made.recorders[rank].done()
    verdict = look(made)
    assert verdict.verdict == ("corrupt" if then == "caught" else "deadlock"), verdict
    assert (verdict.cause, verdict.culprits, verdict.suspects) == (cause, (), (1,)), verdict
    assert verdict.confidence == "undecided" and "nobody is absent" not in " ".join(verdict.evidence), verdict
    sides = {tuple(side["ranks"]) for side in verdict.first_divergence["sides"]}  # type: ignore[index]
    assert sides == {(0, 2, 3), (1,)}, verdict
    if then != "caught":
        assert "ranks 0,2,3 completed it" in " ".join(verdict.evidence), verdict
        assert look(made, after_s=0.5).verdict == "inconclusive"


def test_a_difference_that_one_side_completed_long_ago_does_not_hide_a_later_one() -> None:
    """Each group is looked at from where its own ranks stand."""
    made = Scene(4, {"world": range(4)})
    made.enter((0, 2, 3), SUM)
    made.enter((1,), SUM._replace(dtype="float64"))
    made.leave((0, 2, 3), SUM)
    made.enter((0, 2, 3), BROADCAST)
    verdict = look(made, alive={1: False}, died={1: made.now_ns / 1e9 + 0.5})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "mismatch", ()), verdict


def test_a_difference_that_no_rank_waits_in_leaves_a_stall_elsewhere_undecided_and_is_named() -> None:
    """Both may be queued on one device."""
    made = Scene(4, {"world": range(4), "other": range(4)})
    for rank in range(4):
        made.recorders[rank].issue(SUM._replace(sizes=(8 if rank == 1 else 4,)))
    made.enter(range(4), SUM._replace(group="other"))
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("inconclusive", (), "undecided"), verdict
    assert "world #1 was issued with different arguments and may be the cause" in verdict.evidence, verdict
    assert verdict.first_divergence is not None


def test_what_the_others_did_after_a_collective_that_only_they_completed_is_no_cause() -> None:
    """All ranks issue an undeclared collective in every step. Rank 5 waits before it, with other sizes."""
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.all_of(EVERYONE, EXTRA)
    for call in STEP[1:]:
        made.all_of(EVERYONE, call)
    others = [rank for rank in EVERYONE if rank != 5]
    made.begin_step(2, PLAN)
    made.enter([5], C1._replace(sizes=(9,)))
    made.all_of(others, C1)
    made.enter(others, EXTRA)
    verdict = look(made)
    assert verdict.cause == "sizes" and set(verdict.culprits) <= {5} and set(verdict.suspects) <= {5}, verdict


def test_a_rank_that_still_knows_the_sizes_of_a_call_does_not_differ_from_those_that_lost_them():
    """The ring of size vectors of two ranks has gone on; they issued the same as the third, and the fourth did not."""
    made = Scene(4, {"ep": range(4), "pair": (0, 1)}, shape=dataclasses.replace(SMALL, vector_words=16))
    sizes = (1, 2, 3, 4)
    made.all_of(range(3), Collective("ep", "all_gather_v", "moe", sizes, "float32"))
    made.all_of([3], Collective("ep", "all_gather_v", "moe", sizes, "int32"))
    for number in range(8):
        made.all_of((0, 1), Collective("pair", "all_gather_v", "moe", (number, number + 1), "float32"))
    made.enter(range(4), Collective("ep", "all_reduce", "step", (1,), "int32", "sum"))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.suspects) == ("corrupt", "mismatch", (3,))


def test_the_ranks_that_changed_sizes_that_had_been_the_same_are_suspects_even_if_they_are_most_of_the_ranks():
    made = Scene(4, {"world": range(4)})
    for _ in range(3):
        made.all_of(range(4), SUM)
    made.enter((0, 1, 2), SUM._replace(sizes=(8,)))
    made.enter((3,), SUM)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits, verdict.suspects) == ("deadlock", "sizes", (), (0, 1, 2))
    assert "ranks 0-2 changed arguments that had been the same on all ranks" in verdict.evidence, verdict
