"""What `diagnose` says of log lines: whose error was first, which lines belong together, which rank differs."""

from __future__ import annotations

import pytest
from foreign import watchdog, write

from repro.ingest.read import read
from repro.verdict.partial import diagnose

WORLD = "INFO 10-22 09:43:49 [parallel_state.py:1] rank 0 in world size 4 is assigned as TP rank 0"


def diagnosed(folder):
    diagnosis = diagnose(read([folder]).records)
    return diagnosis, "\n".join((*diagnosis.summary, *diagnosis.evidence, *diagnosis.collect, *diagnosis.notes))


def detail(rank, op, other, other_op):
    def one(name):
        return f"CollectiveFingerPrint(SequenceNumber=31, OpType={name}, TensorShape=[10, 2])"

    return (
        f"[rank{rank}]: RuntimeError: Detected mismatch between collectives on ranks. Rank {rank} is running "
        f"collective: {one(op)}, but Rank {other} is running collective: {one(other_op)}.Collectives differ\n"
    )


def test_the_rank_that_debug_detail_finds_in_another_collective_than_all_others_is_a_suspect(tmp_path):
    files = {f"rank_{r}.log": detail(r, "ALLREDUCE", 2, "BROADCAST") for r in (0, 1, 3)}
    files["rank_2.log"] = detail(2, "BROADCAST", 0, "ALLREDUCE")
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.cause) == ("crash", "mismatch"), text
    assert (diagnosis.culprits, diagnosis.suspects) == ((), (2,)), text
    assert "Rank 2 differs from the other ranks" in text


def test_of_two_sides_of_the_same_size_that_debug_detail_finds_neither_is_a_suspect(tmp_path):
    files = {"rank_0.log": detail(0, "ALLREDUCE", 1, "BROADCAST"), "rank_1.log": detail(1, "BROADCAST", 0, "ALLREDUCE")}
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.cause, diagnosis.culprits, diagnosis.suspects) == ("mismatch", (), ()), text


def error(clock, rank, what):
    return f"[rank{rank}]:[E1128 {clock}.05 x.cpp:1] {what}\n"


MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB."
DEVICE = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("first", "second", "certain"),
    [
        ("09:43:30", "10:43:31", False),
        ("09:43:30", "15:11:30", False),  # five hours and a half, less two minutes
        ("09:43:30", "10:28:30", True),
        ("09:43:30", "09:44:30", True),
    ],
)
def test_of_two_errors_half_an_hour_or_hours_apart_the_logs_do_not_show_which_was_first(
    tmp_path, first, second, certain
):
    """One of the two hosts may write the times of another time zone."""
    files = {"rank_1.log": error(first, 1, MEMORY), "rank_2.log": error(second, 2, DEVICE)}
    diagnosis, text = diagnosed(write(tmp_path, files))
    named = ((1,), ()) if certain else ((), (1, 2))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("crash", *named), text
    assert ("the clocks are of two time zones" in text) is not certain


def counters(rank, queued, completed):
    """The line in which a rank's own watchdog asks for a dump. Its counters are those of the default group."""
    return (
        f"[rank{rank}]:[E1003 11:42:08.05 ProcessGroupNCCL.cpp:1858] [PG ID 0 PG GUID 0(default_pg) Rank {rank}] "
        "Received a dump signal due to a collective timeout from this local rank and we will try our best to dump the "
        f"debug info. Last enqueued NCCL work: {queued}, last completed NCCL work: {completed}.This is most likely\n"
    )


@pytest.mark.parametrize(
    ("queued", "completed", "fits"), [(414, 412, True), (413, 412, True), (412, 412, False), (500, 413, False)]
)
def test_counters_belong_to_a_time_out_only_if_its_operation_is_queued_and_not_complete_in_them(
    tmp_path, queued, completed, fits
):
    files = {}
    for rank in (0, 1, 3):
        time_out, _named = watchdog(rank, 413, "BROADCAST").splitlines(keepends=True)
        files[f"rank{rank}.log"] = time_out + counters(rank, queued, completed)
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.culprits) == ("inconclusive", ()), text
    assert ("broadcast #413 of default_pg" in text) is fits, text


def test_only_the_exit_that_torchrun_saw_first_is_said_to_be_the_first(tmp_path):
    signal = counters(2, 412, 412).replace("this local rank", " rank 1")
    signal += "[rank2]: RuntimeError: [/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4\n"
    files = {f"rank{r}.log": watchdog(r, 413, "BROADCAST", queued=414, group="0(default_pg)") for r in (0, 1, 3)}
    files["rank2.log"] = signal
    files["console.log"] = f"{WORLD}\n" + "".join(
        f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : 1 (pid: {40 + rank})\n" for rank in (3, 0)
    )
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.suspects) == ("deadlock", (2,)), text
    lines = [line for line in diagnosis.evidence if "this process ended first" in line]
    assert len(lines) == 1 and lines[0].startswith("Torchrun saw rank 3 exit first"), text


CONNECT = (
    "[rank{rank}]: RuntimeError: [/x/gloo/transport/tcp/pair.cc:144] connectFullMesh failed: timed out connecting: "
    "SO_ERROR: Connection refused, remote=[10.0.0.52]:39075\n"
)
LOOPBACK = (
    "[rank1]:[W1128 09:43:30.05 ProcessGroupGloo.cpp:1] Unable to resolve hostname to a (local) address. Using the "
    "loopback address as fallback. Manually set the network interface to bind to with GLOO_SOCKET_IFNAME.\n"
)


def test_a_start_that_fails_names_the_host_that_offers_loopback_and_shows_the_errors(tmp_path):
    files = {"rank_0.log": CONNECT.format(rank=0), "rank_1.log": LOOPBACK + CONNECT.format(rank=1)}
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits) == ("crash", "start", ()), text
    assert "The host of rank 1 offers 127.0.0.1" in text, text
    for rank in (0, 1):
        assert any(
            line.startswith(f"rank {rank}: gloo could not connect its ranks") and f"rank_{rank}.log" in line
            for line in diagnosis.evidence
        ), text
