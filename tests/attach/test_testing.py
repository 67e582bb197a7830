"""The harness for other people's code: what is right passes, what hangs, raises or dies fails with the reason."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from ended import has_ended
from torch.distributed import all_reduce as imported_by_name

from repro.attach.harness import DeadlockError, Ranks, assert_no_deadlock

ROOT = Path(__file__).resolve().parents[2]


def failure_message(ranks, function) -> str:
    with pytest.raises(DeadlockError) as caught:
        ranks.run(function)
    return str(caught.value)


def test_what_the_ranks_return_comes_back_by_rank(tmp_path):
    def sums(rank):
        x = torch.full((4,), float(rank.rank))
        gathered = [torch.zeros(4) for _ in range(3)]
        adds = [dist.ReduceOp(dist.ReduceOp.SUM) for _ in range(1 + rank.rank)]  # the last at another address in each
        with assert_no_deadlock("layer 0"):
            dist.all_reduce(x, op=adds[-1])
            work = dist.all_gather(gathered, x, async_op=True)
            work.wait()
            dist.broadcast(x, src=1)
            dist.barrier()
        return x.sum().item(), len(gathered)

    assert Ranks(3, "gloo", tmp_path).run(sums) == [(12.0, 3)] * 3
    assert dist.all_reduce is imported_by_name, "nothing stays exchanged"


def test_a_skipped_collective_names_the_ranks_the_call_and_the_place(tmp_path):
    def skips(rank):
        with assert_no_deadlock("dispatch"):
            if rank.rank != 2:
                imported_by_name(torch.zeros(8))

    message = failure_message(Ranks(3, "gloo", tmp_path, quiet_window_s=0.3), skips)
    assert "deadlock" in message and "ranks 0,1 wait in world all_reduce #1" in message, message
    assert "rank 2 is done" in message and "in skips" in message, message
    assert (tmp_path / "run1" / "report.html").is_file()


@pytest.mark.full  # as of two groups of one description, below
def test_two_groups_in_another_order_are_a_cycle(tmp_path):
    def crossed(rank):
        a = dist.new_group([0, 1], group_desc="a")
        b = dist.new_group([0, 1], group_desc="b")
        with assert_no_deadlock():
            for group in (a, b) if rank.rank else (b, a):
                dist.all_reduce(torch.zeros(1), group=group)

    message = failure_message(Ranks(2, "gloo", tmp_path, quiet_window_s=0.3), crossed)
    assert message.startswith("deadlock"), message
    assert "rank 0 waits in b all_reduce #1" in message and "rank 1 waits in a all_reduce #1" in message, message


def test_two_groups_of_one_description_are_two(tmp_path):
    """As those of one dimension of two meshes, or two that a library makes alike."""

    def crossed(rank):
        a, b = (dist.new_group([0, 1], group_desc="ep") for _ in range(2))
        with assert_no_deadlock():
            for group in (a, b) if rank.rank else (b, a):
                dist.all_reduce(torch.zeros(1), group=group)

    message = failure_message(Ranks(2, "gloo", tmp_path, quiet_window_s=0.3), crossed)
    assert message.startswith("deadlock"), message
    assert "rank 0 waits in ep.2 all_reduce #1" in message and "rank 1 waits in ep all_reduce #1" in message, message

    def in_pairs(rank):
        """A rank that is not a member of a group issues nothing in it."""
        groups = [dist.new_group(pair, group_desc="pair") for pair in ((0, 1), (0, 2), (1, 2))]
        with assert_no_deadlock():
            for group in groups:
                dist.all_reduce(torch.zeros(1), group=group)
        return rank.rank

    assert Ranks(3, "gloo", tmp_path).run(in_pairs) == [0, 1, 2]  # beside the evidence of the run before


def test_a_run_that_ends_with_wrong_numbers_fails(tmp_path):
    """What was done is not yet right: other operations under one number give every rank another sum."""

    def mixes(rank):
        with assert_no_deadlock():
            dist.all_reduce(torch.ones(4), op=dist.ReduceOp.MAX if rank.rank == 1 else dist.ReduceOp(dist.ReduceOp.SUM))

    message = failure_message(Ranks(3, "gloo", tmp_path), mixes)
    assert message.startswith("corrupt (mismatch)") and "world #1" in message, message


def test_roots_are_compared_whatever_they_are_called(tmp_path):
    def same(rank):
        with assert_no_deadlock():
            if rank.rank == 0:
                dist.broadcast(torch.zeros(4), src=0)
            else:
                dist.broadcast(torch.zeros(4), group_src=0)
            parts = [torch.zeros(1) for _ in range(3)] if rank.rank == 0 else None
            dist.gather(torch.zeros(1), parts, **({"dst": 0} if rank.rank == 1 else {}))
        return rank.rank

    assert Ranks(3, "gloo", tmp_path).run(same) == [0, 1, 2]

    def another(rank):
        with assert_no_deadlock():
            dist.broadcast(torch.zeros(4), group_src=1 if rank.rank == 2 else 0)

    assert "mismatch" in failure_message(Ranks(3, "gloo", tmp_path, quiet_window_s=0.3), another)


def test_names_of_blocks_may_differ_by_rank_but_not_between_names_that_ranks_share(tmp_path):
    def each_its_own(rank):
        with assert_no_deadlock(f"expert {rank.rank}"):
            dist.all_reduce(torch.zeros(4))
        with assert_no_deadlock("after"):
            dist.barrier()
        return rank.rank

    assert Ranks(3, "gloo", tmp_path).run(each_its_own) == [0, 1, 2]

    def one_is_ahead(rank):
        for layer in ("layer 0", "layer 1") if rank.rank else ("layer 1", "layer 0"):
            with assert_no_deadlock(layer):
                dist.all_reduce(torch.zeros(4))

    message = failure_message(Ranks(3, "gloo", tmp_path), one_is_ahead)
    assert message.startswith("corrupt"), message
    assert "world #1 differs in name of the block: rank 0 'layer 1', ranks 1,2 'layer 0'" in message, message


def test_a_transfer_that_is_not_sent_and_a_functional_collective_that_is_left_out_are_found(tmp_path):
    def unsent(rank):
        with assert_no_deadlock("stage"):
            if rank.rank == 0:
                dist.recv(torch.zeros(4), src=1)
            else:
                dist.barrier()

    message = failure_message(Ranks(2, "gloo", tmp_path, quiet_window_s=0.3), unsent)
    assert "rank 0 waits in world:1>0 recv #1" in message, message

    # The first such collective of a process imports this, for longer than the quiet window.
    importlib.import_module("torch._dynamo")

    def functional(rank):
        with assert_no_deadlock("expert"):
            if rank.rank:
                functional_collectives.all_reduce(torch.ones(4), "sum", dist.group.WORLD).sum().item()

    message = failure_message(Ranks(3, "gloo", tmp_path, quiet_window_s=0.3), functional)
    assert message.startswith("deadlock") and "ranks 1,2 wait in world all_reduce #1" in message, message


def test_a_coalesced_collective_that_a_rank_leaves_out_is_found(tmp_path):
    def leaves_out(rank):
        with assert_no_deadlock():
            if rank.rank != 2:
                dist.all_reduce_coalesced([torch.zeros(4), torch.zeros(4)])
            dist.barrier()

    message = failure_message(Ranks(3, "gloo", tmp_path, quiet_window_s=0.3, deadline_s=20), leaves_out)
    assert message.startswith("deadlock"), message


def test_other_sizes_that_one_side_got_through_are_no_stall(tmp_path):
    def other_sizes(rank):
        with assert_no_deadlock():
            dist.all_reduce(torch.zeros(8 if rank.rank == 1 else 4))
            dist.all_reduce(torch.zeros(4))

    message = failure_message(Ranks(4, "gloo", tmp_path, quiet_window_s=0.3), other_sizes)
    assert not message.startswith("stall") and "sizes" in message, message


@pytest.mark.full
def test_a_collective_that_moves_bytes_for_longer_than_the_quiet_window_is_no_hang(tmp_path):
    def long(rank):
        x = torch.ones(60_000_000)
        with assert_no_deadlock():
            dist.all_reduce(x)
        return float(x[-1])

    assert Ranks(4, "gloo", tmp_path, quiet_window_s=0.3).run(long) == [4.0] * 4


def test_a_failure_of_the_watcher_is_not_the_fault_of_the_code_under_test(tmp_path, monkeypatch):
    monkeypatch.setattr("repro.watch.look.judge", lambda *args, **options: {}["slip"])

    def waits(rank):
        with assert_no_deadlock():
            if rank.rank:
                dist.barrier()

    with pytest.raises(RuntimeError, match="the watcher failed, so nothing is known about the run: KeyError"):
        Ranks(2, "gloo", tmp_path, quiet_window_s=0.3).run(waits)


def test_a_lock_that_nobody_holds_is_found_in_a_test_too(tmp_path):
    path = tmp_path / "baton"
    path.touch()

    def waits(rank):
        rank.recorder.local("lock_wait", str(path), -1)
        while path.exists():
            time.sleep(0.01)

    message = failure_message(Ranks(2, "gloo", tmp_path, quiet_window_s=0.3, deadline_s=20), waits)
    assert message.startswith("deadlock (lock)") and "no process holds" in message, message


def test_no_ranks_test_nothing(ep_ranks):
    with pytest.raises(ValueError, match=r"ep_ranks\(0\): the number of ranks must be"):
        ep_ranks(0)


def test_what_a_rank_started_ends_with_it(tmp_path):
    def starts(rank):
        return subprocess.Popen(["sleep", "600"]).pid

    for pid in Ranks(2, "gloo", tmp_path).run(starts):
        assert has_ended(pid)


def test_a_rank_that_raises_fails_the_test_with_its_traceback(tmp_path):
    def raises(rank):
        with assert_no_deadlock():
            if rank.rank == 1:
                raise ValueError("the router is upside down")
            dist.barrier()

    message = failure_message(Ranks(2, "gloo", tmp_path), raises)
    assert "ValueError: the router is upside down" in message and "in raises" in message, message


def test_a_rank_that_dies_is_the_culprit(tmp_path):
    def dies(rank):
        with assert_no_deadlock():
            if rank.rank == 1:
                os._exit(3)
            dist.barrier()

    message = failure_message(Ranks(2, "gloo", tmp_path), dies)
    assert message.startswith("crash (dead_rank)") and "rank 1 died" in message, message


@pytest.mark.full
def test_a_rank_that_never_comes_ends_at_the_deadline(tmp_path):
    def spins(rank):
        with assert_no_deadlock():
            while rank.rank == 1:
                pass
            dist.barrier()

    message = failure_message(Ranks(2, "gloo", tmp_path, quiet_window_s=0.3, deadline_s=2), spins)
    assert message.startswith("not done after 2 s") and "in spins" in message, message


@pytest.mark.full
def test_a_rank_that_dies_before_it_opens_its_log_hides_nothing_and_escapes_do_nothing(tmp_path, monkeypatch):
    run = Ranks._run_rank
    monkeypatch.setattr(Ranks, "_run_rank", lambda self, *args: os._exit(3) if args[1] == 1 else run(self, *args))

    def prints(rank):
        print("\x1b[2Jhello")

    message = failure_message(Ranks(2, "gloo", tmp_path, quiet_window_s=0.3, deadline_s=1), prints)
    assert message.startswith("not done after 1 s") and "\x1b" not in message, message


def test_outside_of_a_rank_it_says_where_it_belongs():
    with pytest.raises(RuntimeError, match="ep_ranks"), assert_no_deadlock():
        pass


@pytest.mark.full
def test_the_plugin_gives_fixture_and_marker(tmp_path):
    (tmp_path / "test_theirs.py").write_text(
        "import pytest, torch.distributed as dist\n"
        "def test_runs(ep_ranks):\n    assert ep_ranks(2).run(lambda rank: rank.rank) == [0, 1]\n"
        "@pytest.mark.requires_gpus(n=512)\ndef test_needs_gpus():\n    raise AssertionError\n"
        "def test_nccl(ep_ranks):\n    ep_ranks(512, 'nccl')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:hybrid_moe_repro",
        "-p",
        "repro.attach.pytest_plugin",
        "-rs",
        "-q",
    ]
    run = subprocess.run(
        [*command, "--strict-markers", str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0 and "1 passed, 2 skipped" in run.stdout, run.stdout + run.stderr
    assert "needs 512 GPUs" in run.stdout


@pytest.mark.full
def test_the_example_runs():
    command = [sys.executable, "-m", "pytest", "-p", "no:hybrid_moe_repro", "-p", "repro.attach.pytest_plugin", "-q"]
    run = subprocess.run([*command, "examples/test_dispatcher.py"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and "2 passed" in run.stdout, run.stdout + run.stderr


def test_the_plugin_imports_neither_torch_nor_the_harness():
    loaded = "any(name in sys.modules for name in ('torch', 'repro.attach.harness'))"
    code = f"import sys, repro.attach.pytest_plugin; sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
