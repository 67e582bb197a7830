"""The guard's step agreement: what the ranks compare, and the sentences with which they stop."""

from __future__ import annotations

import time

import pytest
import torch

from repro.attach.vllm.guard.ending.stop import Refused
from repro.attach.vllm.guard.meeting.board import Field

GDN = "model.layers.0.linear_attn"


def test_the_rows_that_vllm_gets_back_are_those_without_the_guard(ranks):
    all_ranks = ranks(3)
    rows = {}

    def program(rank, guard):
        rows[rank] = [all_ranks.step(rank, guard, tokens=rank + 1) for _ in range(5)]

    assert all_ranks.run(program) == [None] * 3
    expected = torch.tensor([[1, 2, 3], [1, 2, 3], [0, 0, 0], [0, 0, 0]], dtype=torch.int32)
    for each in rows.values():
        assert all(torch.equal(got, expected) for got in each)


def test_one_more_agreement_in_a_layer_is_refused_on_all_ranks_before_it_is_issued(ranks):
    all_ranks = ranks(2)
    issued = []

    def program(rank, guard):
        for _ in range(5):
            all_ranks.step(rank, guard)
        guard.begin_execution()
        all_ranks.agree(rank, guard)
        if rank == 1:
            guard.layer = GDN
            guard.issue("dp.cpu", "all_reduce", lambda: issued.append("extra"))
        all_ranks.exchange(guard, "all_gather_v")

    raised = all_ranks.run(program)
    sentence = (
        f"rank 1 would issue dp.cpu all_reduce of {GDN} (refused before it was issued); the agreed schedule has "
        "ep all_gather_v of model.layers.0.mlp.experts, which rank 0 issued"
    )
    assert [stop.sentence for stop in all_ranks.stops] == [sentence, sentence]
    assert [type(error) for error in raised] == [Refused, Refused] and not issued


def test_a_second_step_agreement_inside_a_layer_is_refused_too(ranks):
    all_ranks = ranks(2)

    def program(rank, guard):
        for _ in range(5):
            all_ranks.step(rank, guard)
        guard.begin_execution()
        all_ranks.agree(rank, guard)
        if rank == 1:
            guard.layer = GDN
            all_ranks.agree(rank, guard)
        all_ranks.exchange(guard, "all_gather_v")

    all_ranks.run(program)
    assert all(
        stop.sentence.startswith("rank 1 would issue dp.cpu all_reduce of the step agreement")
        for stop in all_ranks.stops
    )


def test_a_second_step_agreement_after_the_last_layer_meets_the_next_one_of_the_others_and_is_named(ranks):
    all_ranks = ranks(2)

    def program(rank, guard):
        for _ in range(5):
            all_ranks.step(rank, guard)
        if rank == 1:
            guard.begin_execution()
            guard.layer = GDN
            all_ranks.agree(rank, guard)
        else:
            all_ranks.step(rank, guard)

    all_ranks.run(program)
    sentence = all_ranks.stops[1].sentence
    assert f"rank 1 issued dp.cpu all_reduce of the step agreement in {GDN}" in sentence, sentence


def test_before_a_schedule_is_known_ranks_that_wait_in_different_collectives_find_the_difference(ranks):
    all_ranks = ranks(2)

    def program(rank, guard):
        guard.begin_execution()
        all_ranks.agree(rank, guard)
        all_ranks.exchange(guard, "all_gather_v" if rank == 0 else "all_reduce", GDN)

    raised = all_ranks.run(program)
    sides = f"rank 0 issued ep all_gather_v of {GDN}, rank 1 issued ep all_reduce of {GDN}"
    sentence = f"the ranks differ in collective 1: {sides}"
    assert [stop.sentence for stop in all_ranks.stops] == [sentence] * 2
    assert all(isinstance(error, Refused) for error in raised)


def test_ranks_that_all_do_something_new_go_on(ranks):
    all_ranks = ranks(3)

    def program(rank, guard):
        for number in range(9):
            guard.begin_execution()
            all_ranks.agree(rank, guard)
            all_ranks.exchange(guard, "all_gather_v")
            if number == 6:
                all_ranks.exchange(guard, "broadcast", "rebalance")
            all_ranks.exchange(guard, "reduce_scatter_v")
            guard.end_execution()

    assert all_ranks.run(program) == [None] * 3
    assert [stop.sentence for stop in all_ranks.stops] == [""] * 3


def test_a_slow_rank_is_not_refused(ranks):
    all_ranks = ranks(2)

    def program(rank, guard):
        for number in range(6):
            guard.begin_execution()
            all_ranks.agree(rank, guard)
            if rank == 1 and number == 5:
                time.sleep(2.5)
            all_ranks.exchange(guard, "all_gather_v")
            guard.end_execution()

    assert all_ranks.run(program) == [None, None]
    assert [stop.sentence for stop in all_ranks.stops] == ["", ""]


def test_an_execution_that_one_engine_counted_and_did_not_request_is_found_at_the_next_agreement(ranks):
    all_ranks = ranks(2)

    def program(rank, guard):
        board = all_ranks.boards[rank]
        for number in range(4):
            if rank == 0 and number == 2:
                board[Field.COUNTED] += 1
            board.request()
            all_ranks.step(rank, guard)
            board[Field.COUNTED] += 1

    all_ranks.run(program)
    sentence = all_ranks.stops[0].sentence
    assert sentence.startswith("rank 0 left out execution 3: its engine counted 3 executions and requested 2"), sentence
    assert all_ranks.stops[1].sentence == sentence


def test_an_engine_that_asks_after_fewer_executions_is_named_while_the_others_wait(ranks):
    all_ranks = ranks(2)

    def program(rank, guard):
        board = all_ranks.boards[rank]
        for _ in range(4):
            board.request()
            all_ranks.step(rank, guard)
            board[Field.COUNTED] += 1
        if rank == 0:
            board[Field.ASKED] += 1
            all_ranks.meet("engines")
        else:
            all_ranks.step(rank, guard)

    all_ranks.run(program)
    sentence = (
        'rank 0 left out an execution: its engine asks "is anyone unfinished?" after 4 executions, and rank 1 waits '
        "for it in dp.cpu all_reduce of the step agreement"
    )
    assert [stop.sentence for stop in all_ranks.stops] == [sentence] * 2


def test_a_question_that_the_waiting_rank_s_engine_has_answered_explains_nothing(ranks):
    all_ranks = ranks(2)

    def program(rank, guard):
        board = all_ranks.boards[rank]
        board.request()
        all_ranks.step(rank, guard)
        board[Field.COUNTED] += 1
        if rank == 0:
            board[Field.ASKED] += 1  # it has the answer, and was not scheduled since
            time.sleep(3)
            board[Field.ANSWERED] += 1
        else:
            board[Field.ASKED] = board[Field.ANSWERED] = 1
        board.request()
        all_ranks.step(rank, guard)

    assert all_ranks.run(program) == [None, None]


def test_a_rank_that_fails_stops_those_that_wait_for_it(ranks):
    all_ranks = ranks(2)

    def program(rank, guard):
        all_ranks.step(rank, guard)
        if rank == 1:
            guard.fail(RuntimeError("no memory"))
        else:
            all_ranks.step(rank, guard)

    raised = all_ranks.run(program)
    assert str(raised[0]) == "rank 1 failed: RuntimeError: no memory" and isinstance(raised[0], Refused)


def test_observe_prints_what_it_would_refuse_once_and_goes_on(ranks, capfd):
    all_ranks = ranks(2, "observe")

    def program(rank, guard):
        board = all_ranks.boards[rank]
        for number in range(4):
            if rank == 0 and number == 2:
                board[Field.COUNTED] += 1
            board.request()
            all_ranks.step(rank, guard)
            board[Field.COUNTED] += 1

    assert all_ranks.run(program) == [None, None]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[rank 0]")]
    assert lines and all(line.startswith("[rank 0] repro guard: would refuse: rank 0 left out") for line in lines), (
        lines
    )


def test_digests_that_differ_without_a_difference_stop_no_rank(ranks, capfd):
    all_ranks = ranks(2)

    def program(rank, guard):
        for _ in range(3):
            if rank == 0:
                all_ranks.boards[rank].request()  # the other engine's requests are not counted
            all_ranks.step(rank, guard)

    all_ranks.boards[0][Field.COUNTED] = -5
    assert all_ranks.run(program) == [None, None]
    assert "the guard does not compare how many executions the engines counted" in capfd.readouterr().err


def test_a_process_that_is_blocked_is_ended_with_the_exit_code(ranks):
    all_ranks = ranks(2)
    all_ranks.meeting().refuse("rank 9 is not there")
    deadline = time.monotonic() + 60
    while not all(all_ranks.left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [codes[0] for codes in all_ranks.left] == [86, 86]


@pytest.mark.parametrize("number", [6, 7])
def test_the_rows_of_the_new_model_runner_are_widened_alike(ranks, number):
    all_ranks = ranks(2)
    got = {}

    def program(rank, guard):
        for _ in range(4):
            rows = torch.zeros(number, 2, dtype=torch.int32)
            rows[:, rank] = torch.arange(number) + 10 * rank
            guard.agree("dp.cpu", rows, lambda wide: all_ranks.all_reduce(rank, wide))
            all_ranks.exchange(guard, "all_gather_v")
        got[rank] = rows

    assert all_ranks.run(program) == [None, None]
    assert got[0][:, 1].tolist() == [number_ + 10 for number_ in range(number)] and torch.equal(got[0], got[1])
