"""What `diagnose` says of dumps that lack a rank or the members of a group, and of dumps together with stacks."""

from __future__ import annotations

import pytest
from foreign import C10D, call, dump, py_spy, write

from repro.ingest.read import read
from repro.verdict.partial import diagnose

BUSY_LOOP = "worker_busy_loop (vllm/v1/executor/multiproc_executor.py:1041)"
WORLD = {"console.log": "INFO 10-22 09:43:49 [parallel_state.py:1] rank 0 in world size 4 is assigned as TP rank 0\n"}


def diagnosed(folder):
    diagnosis = diagnose(read([folder]).records)
    return diagnosis, "\n".join((*diagnosis.summary, *diagnosis.evidence, *diagnosis.collect, *diagnosis.notes))


def dumps(calls, groups=None):
    """Dumps by rank. Without ``groups`` they do not list the members of a group, as on gloo."""
    return {f"trace_rank_{rank}": dump(entries, groups) for rank, entries in calls.items()}


def gloo(number, op="all_reduce", *, group="0", done=True, at_ms=0):
    return call(number, op, group=(int(group), group, "undefined"), backend="gloo", done=done, at_ms=at_ms)


@pytest.mark.parametrize(
    ("ranks", "files", "verdict", "confidence"),
    [
        ((0, 1, 2, 3), WORLD, "clean", "likely"),
        ((0, 1, 2, 3), {}, "clean", "undecided"),
        ((0, 1, 2), WORLD, "clean", "undecided"),
        ((0, 1, 3), {}, "inconclusive", "undecided"),
        ((1, 2, 3), {}, "inconclusive", "undecided"),
        ((1, 2, 3), WORLD, "inconclusive", "undecided"),
    ],
)
def test_dumps_without_a_wait_are_clean_only_if_no_rank_between_them_lacks_a_dump(
    tmp_path, ranks, files, verdict, confidence
):
    finished = [gloo(number) for number in range(1, 5)]
    diagnosis, text = diagnosed(write(tmp_path, {**dumps(dict.fromkeys(ranks, finished)), **files}))
    assert (diagnosis.verdict, diagnosis.confidence) == (verdict, confidence), text


@pytest.mark.parametrize(
    ("ranks", "files", "verdict"),
    [
        ((0, 1, 2, 3), WORLD, "stall"),
        ((0, 1, 2), WORLD, "inconclusive"),
        ((1, 2, 3), WORLD, "inconclusive"),
        ((0, 1, 2, 3), {}, "inconclusive"),
    ],
)
def test_a_wait_of_all_dumps_is_a_stall_only_if_they_are_the_dumps_of_all_ranks(tmp_path, ranks, files, verdict):
    waiting = [gloo(1), gloo(2, done=False)]
    diagnosis, text = diagnosed(write(tmp_path, {**dumps(dict.fromkeys(ranks, waiting)), **files}))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == (verdict, (), ()), text
    assert ("do not list the members" in text) is (verdict == "inconclusive"), text


def test_a_transfer_is_said_to_come_from_the_peer_or_to_go_to_it(tmp_path):
    """Ranks 4 and 6 both receive first; ranks 0 and 2 both send first."""
    groups = {"11": ("pp", [4, 6]), "12": ("tp", [0, 2])}
    calls = {
        4: [call(1, "recv 0<-1", group=(3, "11", "pp"), p2p=True, done=False)],
        6: [call(1, "recv 1<-0", group=(3, "11", "pp"), p2p=True, done=False)],
    }
    _, text = diagnosed(write(tmp_path / "recv", dumps(calls, {"11": groups["11"]})))
    assert "rank 4 waits in recv from rank 6 of" in text and "rank 6 waits in recv from rank 4 of" in text, text
    calls = {
        0: [call(1, "send 0->1", group=(4, "12", "tp"), p2p=True, done=False)],
        2: [call(1, "send 1->0", group=(4, "12", "tp"), p2p=True, done=False)],
    }
    _, text = diagnosed(write(tmp_path / "send", dumps(calls, {"12": groups["12"]})))
    assert "rank 0 waits in send to rank 2 of" in text and "rank 2 waits in send to rank 0 of" in text, text


@pytest.mark.parametrize(
    "ops", [("all_gather", "all_gather"), ("all_gather", "broadcast"), ("broadcast", "all_gather")]
)
def test_a_rank_is_named_for_leaving_a_pattern_only_if_all_ranks_had_the_pattern(tmp_path, ops):
    """Rank 1 leaves out the operation that rank 0 waits in. Before, each rank also used a group of its own."""

    def entries(rank):
        rows = []

        def issue(group, op, step, done=True):
            rows.append(gloo(step + 1, op, group=group, done=done, at_ms=len(rows)))

        for step in range(5):
            issue("2", ops[rank], step)
            last = step == 4
            if not (last and rank == 1):
                issue("0", "all_reduce", step, done=not last)
            if last and rank == 0:
                return rows
            issue("1", "all_gather", step, done=not last)
        return rows

    members = {"0": ("undefined", (0, 1)), "1": ("undefined", (0, 1))}
    diagnosis, text = diagnosed(
        write(tmp_path, {
            f"trace_rank_{rank}": dump(entries(rank), {**members, "2": ("undefined", (rank,))}) for rank in range(2)
        })
    )  # fmt: skip
    assert diagnosis.verdict == "deadlock", text
    assert diagnosis.culprits == ((1,) if ops[0] == ops[1] else ()), text


@pytest.mark.parametrize("builds", [False, True])
def test_a_rank_in_a_lock_and_the_ranks_that_wait_for_it_are_a_deadlock_only_if_no_rank_builds(tmp_path, builds):
    """The dumps show the waits in the collective, and the stacks show the wait for the lock."""
    groups = {"1": ("ep", range(3))}
    files = dumps({0: [call(1, "all_reduce", done=False)], 1: [call(1, "all_reduce", done=False)], 2: []}, groups)
    lock = ["acquire (filelock/_api.py:344)", "build_and_load (flashinfer/jit/core.py:286)", BUSY_LOOP]
    inside = [f"all_reduce ({C10D}:2819)", "step (model.py:4)", BUSY_LOOP]
    ninja = ["_wait (subprocess.py:2053)", "run_ninja (flashinfer/jit/cpp_ext.py:310)", BUSY_LOOP]
    for rank, frames in enumerate([inside, ninja if builds else inside, lock]):
        files[f"pyspy_{rank}.txt"] = py_spy(f"VLLM::Worker_TP{rank}", frames, 40 + rank)
    diagnosis, text = diagnosed(write(tmp_path, files))
    if builds:
        assert (diagnosis.verdict, diagnosis.culprits) == ("inconclusive", ()), text
        return
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits) == ("deadlock", "lock", ()), text
    assert diagnosis.suspects == (0, 1), text
    assert "Rank 0: all_reduce #1 of ep is not done" in text and "rank 2 has not queued it" in text, text
    assert "Rank 2 waits for a file lock (filelock) at acquire (filelock/_api.py:344)" in text, text


def thread(name, *frames):
    return f'Thread 7 (idle): "{name}"\n' + "".join(f"    {frame}\n" for frame in frames)


def test_a_stack_of_another_thread_is_not_where_the_rank_is(tmp_path):
    """The main threads are in a collective. A thread of each process waits for a file lock."""
    files = {}
    for rank in range(2):
        files[f"pyspy_{rank}.txt"] = (
            py_spy(f"VLLM::Worker_TP{rank}", [f"all_reduce ({C10D}:2819)", "step (model.py:4)", BUSY_LOOP], 40 + rank)
            + "\n"
            + thread("saver", "acquire (filelock/_api.py:344)", "save (saver.py:3)")
        )
    _, text = diagnosed(write(tmp_path, files))
    assert "all_reduce" in text and "lock" not in text, text
