"""What `diagnose` says of other people's evidence: right where it is proven, and nothing where it is not."""

from __future__ import annotations

import random

import pytest
from foreign import C10D, call, dump, py_spy, ras, watchdog, write

from repro.ingest.read import read
from repro.verdict.partial import diagnose

EP = {"1": ("ep", range(4))}
WORKER = "worker_busy_loop (vllm/v1/executor/multiproc_executor.py:1041)"


def diagnosed(folder):
    evidence = read([folder])
    diagnosis = diagnose(evidence.records)
    return diagnosis, "\n".join((*diagnosis.summary, *diagnosis.evidence, *diagnosis.collect, *diagnosis.notes))


def recorders(folder, calls, *, as_json=False, groups=None, status=None):
    files = {
        f"trace_rank_{rank}": dump(entries, groups or EP, (status or {}).get(rank), as_json=as_json)
        for rank, entries in calls.items()
    }
    return write(folder, files)


def test_different_sizes_under_one_number_are_a_deadlock_with_a_suspect(tmp_path):
    history = [call(n, "all_reduce") for n in range(1, 5)]
    odd = call(5, "_all_gather_base", done=False, sizes=((25,), (100,)), frames=[("maybe_save", "train/epoch.py", 140)])
    usual = call(5, "_all_gather_base", done=False, sizes=((33,), (132,)), frames=[("unshard", "train/fsdp.py", 210)])
    diagnosis, text = diagnosed(recorders(tmp_path, {0: [*history, odd], **{r: [*history, usual] for r in (1, 2, 3)}}))
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits, diagnosis.suspects) == (
        "deadlock",
        "sizes",
        (),
        (0,),
    )
    assert "#5" in text and "maybe_save" in text


def test_sizes_of_an_all_to_all_may_differ(tmp_path):
    calls = {r: [call(1, "all_to_all", done=False, sizes=((r + 1,), (r + 9,)))] for r in range(4)}
    diagnosis, _ = diagnosed(recorders(tmp_path, calls))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("stall", (), ())


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("fault", ["extra", "skipped"])
def test_who_leaves_the_rhythm_of_all_ranks_is_named(tmp_path, as_json, fault):
    dp, ep = (0, "0", "undefined"), (1, "1", "undefined")

    def program(rank):
        counts, entries = {dp: 0, ep: 0}, []

        def issue(group, op, done):
            counts[group] += 1
            entries.append(call(counts[group], op, group=group, backend="gloo", done=done, at_ms=len(entries)))

        for step in range(5):
            done = step < 4
            issue(dp, "all_reduce", True)
            if not done and rank == 2 and fault == "extra":
                issue(dp, "all_reduce", False)
                return entries
            for layer in range(3):
                if not done and rank == 2 and fault == "skipped" and layer == 2:
                    continue
                stuck = not done and layer == (0 if fault == "extra" else 2)
                issue(ep, "all_gather", not stuck)
                if stuck:
                    return entries
        issue(dp, "all_reduce", False)
        return entries

    folder = recorders(tmp_path, {r: program(r) for r in range(4)}, as_json=as_json, groups={"": ("", [])})
    diagnosis, text = diagnosed(folder)
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits) == ("deadlock", fault, (2,)), text


def test_a_rank_that_has_not_queued_what_others_wait_in_is_a_suspect_and_no_more(tmp_path):
    history = [call(n, "all_reduce") for n in range(1, 5)]
    calls = {r: [*history, call(5, "all_reduce", done=False)] for r in (0, 1, 3)}
    diagnosis, text = diagnosed(recorders(tmp_path, {**calls, 2: history}))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("inconclusive", (), (2,))
    assert "stacks of rank 2" in text


def test_everybody_receives_and_nobody_sends(tmp_path):
    pp = (3, "11", "pp")
    members = [0, 2, 4, 6]
    files = {}
    for stage, rank in enumerate(members):
        after, before = (stage + 1) % 4, (stage - 1) % 4
        pair = [f"recv {stage}<-{before}", f"send {stage}->{after}"]
        ops = (pair if stage else pair[::-1]) * 3 + pair[:1]
        entries = [call(n + 1, op, group=pp, p2p=True, done=n < 6) for n, op in enumerate(ops)]
        files[f"trace_rank_{rank}"] = dump(entries, {"11": ("pp", members)})
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("deadlock", (), (0,))
    assert "receive" in text and "rank 6" in text  # a global rank, where the dump says 3


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_rank_that_lags_in_several_groups_is_named_as_stopped(tmp_path, kind):
    groups = {"1": ("tp", range(4)), "2": ("dp", range(4))}
    ids = {"5": "1", "6": "2"}
    ahead = {"5": (50, 45), "6": (30, 28)}
    behind = {"5": (45, 45), "6": (28, 28)} if kind == "host" else {"5": (50, 40), "6": (30, 20)}
    files = {}
    for rank in range(4):
        status = behind if rank == 3 else ahead
        entries = [
            call(n, "all_reduce", group=(int(key), name, groups[name][0]), done=False)
            for key, name in ids.items()
            for n in range(status[key][1] + 1, status[key][0] + 1)
        ]
        files[f"trace_rank_{rank}"] = dump(entries, groups, status)
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits) == ("stall", kind, (3,)), text


def test_an_out_of_memory_before_the_time_outs_is_the_cause(tmp_path):
    files = {f"rank_{r}.log": watchdog(r, 7, "ALLREDUCE") for r in (0, 1, 3)}
    files["rank_2.log"] = "[rank2]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB.\n"
    diagnosis, _text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits) == ("crash", "memory", (2,))


def test_an_exception_that_a_rank_survived_is_no_cause(tmp_path):
    files = {f"rank_{r}.log": watchdog(r, 7, "ALLREDUCE") for r in range(4)}
    files["rank_2.log"] = "[rank2]: ValueError: retried\n" + files["rank_2.log"]
    diagnosis, _ = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.culprits) == ("stall", ())


def test_a_closed_connection_points_at_the_rank_that_failed_first(tmp_path):
    diagnosis, text = diagnosed(write(tmp_path, {
        "a.log": "(EngineCore_DP0 pid=1) ERROR 07-13 10:41:52 [core.py:588] RuntimeError: Worker failed "
        "with error '[/x/gloo/transport/tcp/"
        "pair.cc:534] Connection closed by peer [10.0.0.52]:39075', please check the stack trace "
        "above for the root cause\n",
        "b.log": "(Worker_DP3_EP3 pid=2) ERROR 07-13 10:41:49 [x.py:596] torch.AcceleratorError: CUDA "
        "error: an illegal memory access was "
        "encountered\n",
    }))  # fmt: skip
    assert (diagnosis.verdict, diagnosis.culprits) == ("crash", (3,))
    assert "later" in text


def test_seven_that_wait_for_the_lock_of_one_that_builds_are_slow(tmp_path):
    lock = ["acquire (filelock/_api.py:344)", "build_and_load (flashinfer/jit/core.py:286)", WORKER]
    ninja = [
        "_wait (subprocess.py:2053)",
        "run_ninja (flashinfer/jit/cpp_ext.py:310)",
        "build_and_load (flashinfer/jit/core.py:289)",
        WORKER,
    ]
    files = {f"pyspy_{r}.txt": py_spy(f"VLLM::Worker_TP{r}", ninja if r == 5 else lock, 100 + r) for r in range(8)}
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.culprits) == ("slow", (5,))
    assert "lock" in text and "ninja" in text


def test_workers_without_orders_beside_an_engine_that_waits_prove_nothing(tmp_path):
    queue = "dequeue (vllm/distributed/device_communicators/shm_broadcast.py:788)"
    files = {f"w{r}.txt": py_spy(f"VLLM::Worker_TP{r}", [queue, WORKER], 10 + r) for r in range(2)}
    files["e.txt"] = py_spy("VLLM::EngineCore", [queue, "get_response (vllm/v1/executor/multiproc_executor.py:387)"], 9)
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.culprits) == ("inconclusive", ())
    assert "second set of stacks" in text


def test_two_ranks_in_different_collectives_are_both_suspects(tmp_path):
    files = {
        "rank0.txt": py_spy("sglang::scheduler_TP0", ["ncclAllGather (libnccl.so.2)", "forward (sglang/srt/x.py:1)"]),
        "rank1.txt": py_spy("sglang::scheduler_TP1", [f"broadcast ({C10D}:2819)", "recv_requests (sglang/y.py:2)"]),
    }
    diagnosis, _text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("inconclusive", (), (0, 1))


def test_a_heartbeat_is_no_error(tmp_path):
    beat = (
        "(EngineCore pid=702) INFO 02-11 09:17:19 [shm_broadcast.py:802] No available shared "
        "memory broadcast block found in 60 seconds.\n"
    )
    diagnosis, text = diagnosed(write(tmp_path, {"vllm.log": beat * 3}))
    assert (diagnosis.verdict, diagnosis.culprits) == ("inconclusive", ())
    assert "heartbeat" in text and "py-spy" in text


def test_counts_that_move_between_two_answers_of_ras_are_progress(tmp_path):
    rows = [
        "30 ranks have launched up to operation {}",
        "2 ranks have launched up to operation {}",
        "Rank 12 -- GPU 4 managed by process 3 on node h",
    ]
    files = {
        f"ras_{n}.txt": ras("MISMATCH", [rows[0].format(count), rows[1].format(count + 1), rows[2]], 32)
        for n, count in ((1, 640), (2, 2105))
    }
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("inconclusive", (), ())
    assert "progress" in text and "rank 12" not in text.lower()


SIGNAL = (
    "[rank2]:[E1003 11:42:08.0585 ProcessGroupNCCL.cpp:1858] [PG ID 0 PG GUID 0(default_pg) "
    "Rank 2] Received a dump signal due to a "
    "collective timeout from  rank 1 and we will try our best to dump the debug info. Last "
    "enqueued NCCL work: 412, last completed NCCL "
    "work: 412.This is most likely caused by\n"
    "[rank2]: RuntimeError: [/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4\n"
)


def test_some_in_nccl_and_one_in_gloo_wait_for_each_other(tmp_path):
    files = {f"rank{r}.log": watchdog(r, 413, "BROADCAST", queued=414, group="0(default_pg)") for r in (0, 1, 3)}
    diagnosis, text = diagnosed(write(tmp_path, {**files, "rank2.log": SIGNAL}))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("deadlock", (), (2,))
    assert "#413" in text and "gloo" in text


def test_numbers_of_the_default_group_are_not_taken_for_those_of_the_group_that_hangs(tmp_path):
    files = {f"rank{r}.log": watchdog(r, 413, "BROADCAST", queued=414) for r in (0, 1, 3)}
    diagnosis, _ = diagnosed(write(tmp_path, {**files, "rank2.log": SIGNAL}))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("inconclusive", (), ())


def test_a_group_rank_is_never_taken_for_a_global_one(tmp_path):
    files = {f"rank{4 + r}.log": watchdog(4 + r, 9, "ALLREDUCE", group_rank=r) for r in range(4)}
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert "ranks 4-7" in text.lower() and diagnosis.culprits == ()


@pytest.mark.parametrize(("num_ranks", "words"), [(4, "the other rank is"), (5, "the 2 other ranks are")])
def test_ranks_of_which_no_log_speaks_are_counted(tmp_path, num_ranks, words):
    files = {f"rank{rank}.log": watchdog(rank, 7, "ALLREDUCE") for rank in (0, 1, num_ranks - 1)}
    diagnosis, text = diagnosed(write(tmp_path, files))
    assert diagnosis.verdict == "inconclusive" and f"Nothing shows where {words}, so a rank may be absent." in text


def test_fewer_files_never_convict_more_ranks(tmp_path):
    history = [call(n, "all_reduce") for n in range(1, 5)]
    calls = {r: [*history, call(5, "all_reduce", done=False, sizes=((8 + (r == 2),), (8,)))] for r in range(4)}
    for seed in range(20):
        rng = random.Random(seed)
        kept = rng.sample(sorted(calls), rng.randint(1, 4))
        folder = recorders(tmp_path / str(seed), {r: calls[r] for r in kept})
        diagnosis, _ = diagnosed(folder)
        assert diagnosis.culprits == (), f"seed {seed}"
        assert set(diagnosis.suspects) <= {2} or len(kept) < 3, f"seed {seed}"


def test_an_exception_before_a_lone_rank_s_time_out_names_nobody(tmp_path):
    """Of one log of many ranks it is not known who else waits; the exception may have been caught."""
    log = "[rank7]: ValueError: retried\n" + watchdog(7, 9, "ALLREDUCE", queued=12)
    diagnosis = diagnose(read([write(tmp_path, {"rank7.log": log})]).records)
    assert (diagnosis.verdict, diagnosis.culprits) == ("inconclusive", ())


IB = (
    "h1:70:90 [2] NCCL WARN NET/IB : req 0/1 tag 3 peer 10.0.0.1<4000> collective mismatch error, "
    "local size {} remote size {}\n"
)


def test_a_message_of_another_size_makes_the_same_wait_of_all_ranks_no_stall(tmp_path):
    files = {f"log_{rank}.txt": watchdog(rank, 7, "ALLREDUCE") for rank in range(4)}
    files["log_0.txt"] = files["log_0.txt"] + "[rank0]: world size is 4\n"
    assert diagnosed(write(tmp_path / "without", files))[0].verdict == "stall"
    files["log_2.txt"] = f"[rank2]: {IB.format(4096, 8192)}" + files["log_2.txt"]
    diagnosis, text = diagnosed(write(tmp_path / "with", files))
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits) == ("deadlock", "sizes", ()), text
    assert "received 8192 bytes but expected 4096" in text


def test_the_error_that_a_message_of_another_size_causes_convicts_nobody(tmp_path):
    error = "[rank2]: torch.distributed.DistBackendError: NCCL error in: x.cpp:9, invalid usage\n"
    files = {f"log_{rank}.txt": watchdog(rank, 7, "ALLREDUCE") for rank in (0, 1, 3)}
    diagnosis, text = diagnosed(write(tmp_path, {**files, "log_2.txt": f"[rank2]: {IB.format(4096, 8192)}{error}"}))
    assert (diagnosis.culprits, diagnosis.cause) == ((), "sizes"), text


def test_a_message_of_another_size_alone_is_undecided(tmp_path):
    diagnosis, _ = diagnosed(write(tmp_path, {"log_2.txt": IB.format(4096, 8192)}))
    assert (diagnosis.verdict, diagnosis.culprits) == ("inconclusive", ())


def test_a_collective_that_waits_behind_a_transfer_of_its_group_is_part_of_a_cycle(tmp_path):
    """Rank 0 waits in `pp` for rank 1, which has sent what rank 0 receives, and rank 1 in `dp` for rank 0."""
    pp, dp = (3, "11", "pp"), (4, "12", "dp")
    groups = {"11": ("pp", [0, 1]), "12": ("dp", [0, 1])}
    receive = call(1, "recv 0<-1", group=pp, p2p=True, done=False)
    send = call(1, "send 1->0", group=pp, p2p=True, done=False)
    reduce_pp, reduce_dp = call(1, "all_reduce", group=pp, done=False), call(1, "all_reduce", group=dp, done=False)
    folder = recorders(tmp_path, {0: [receive, reduce_pp], 1: [send, reduce_dp]}, groups=groups)
    diagnosis, text = diagnosed(folder)
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits) == ("deadlock", "order", ()), text
