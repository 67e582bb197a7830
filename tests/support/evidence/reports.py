"""Made-up evidence in the form in which users attach it to reports, with the verdict that each supports.

These are kinds of evidence that `hangs` does not have. What a case supports was written before the judge saw it. It is
often less than the injected fault suggests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foreign import C10D, call, dump, py_spy, ras, watchdog

Files = dict[str, "str | bytes"]

DEQUEUE = "dequeue (vllm/distributed/device_communicators/shm_broadcast.py:788)"
BUSY_LOOP = "worker_busy_loop (vllm/v1/executor/multiproc_executor.py:1041)"
C1 = [
    f"all_reduce ({C10D}:3252)", "_run_ar (vllm/v1/worker/dp_utils.py:75)",
    "execute_model (vllm/v1/worker/gpu_worker.py:1328)", BUSY_LOOP,
]  # fmt: skip
IDLE = [DEQUEUE, BUSY_LOOP]


@dataclass(frozen=True)
class Report:
    """The files of a report, and what they support.

    classes   the verdict classes that are right
    may_name  the ranks that may be culprits; all other ranks are innocent
    mentions  texts that must all be in the diagnosis
    """

    files: Files
    classes: tuple[str, ...]
    may_name: frozenset[int] = frozenset()
    must_name: bool = False
    mentions: tuple[str, ...] = ()


def report(
    files: Files, *classes: str, may_name: Sequence[int] = (), must_name: bool = False, mentions: Sequence[str] = ()
) -> Report:
    return Report(files, classes, frozenset(may_name), must_name, tuple(mentions))


def skipped_dummy_once() -> Report:
    """vLLM: idle rank 0 left out a dummy batch.

    Its engine waits for the other engine, which waits for its own worker.
    """
    stacks = {
        "VLLM::EngineCore_DP0": [f"all_reduce ({C10D}:3252)", "sync_dp_state (vllm/config/parallel.py:490)"],
        "VLLM::Worker_DP0_EP0": IDLE,
        "VLLM::EngineCore_DP1": [DEQUEUE, "get_response (vllm/v1/executor/multiproc_executor.py:387)"],
        "VLLM::Worker_DP1_EP1": C1,
    }
    files: Files = {f"{n}.txt": py_spy(title, frames, 40 + n) for n, (title, frames) in enumerate(stacks.items())}
    beat = "No available shared memory broadcast block found in 60 seconds. This typically happens when some processes are hanging"
    files["serve.log"] = f"(EngineCore_DP1 pid=42) INFO 11-28 09:43:49 [shm_broadcast.py:871] {beat}\n" * 2
    return report(files, "inconclusive", mentions=["cycle", "second"])


def skipped_dummy_twice() -> Report:
    one = skipped_dummy_once().files
    again = {f"look{look}/{name}": data for look in (1, 2) for name, data in one.items() if name.endswith(".txt")}
    return report({**again, "serve.log": one["serve.log"]}, "deadlock", mentions=["cycle"])


def straggler_in_the_model() -> Report:
    """One look: rank 1 runs Python code of the model, and rank 0 waits for it in the step agreement."""
    slow = [
        "forward (vllm/model_executor/models/qwen3_next.py:578)",
        "execute_model (vllm/v1/worker/gpu_worker.py:1328)",
        BUSY_LOOP,
    ]
    files: Files = {
        "rank0.txt": py_spy("VLLM::Worker_DP0_EP0", C1, 40), "rank1.txt": py_spy("VLLM::Worker_DP1_EP1", slow, 41),
    }  # fmt: skip
    return report(files, "inconclusive", "slow", may_name=[1], mentions=["rank 1"])


def killed_worker() -> Report:
    """VllmWorker-0 is worker 0 of the engine of dp rank 1, so it is rank 1."""
    files: Files = {
        "dp1.log": "(EngineCore_DP1 pid=42) ERROR 11-28 09:43:49 [multiproc_executor.py:300] Worker proc VllmWorker-0 died "
        "unexpectedly (exit code: -9), shutting down executor.\n",
        "dp0.log": "(Worker_DP0_EP0 pid=41) ERROR 11-28 09:43:50 [multiproc_executor.py:1060] RuntimeError: "
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:4711: Connection reset by peer\n"
        "(EngineCore_DP0 pid=40) ERROR 11-28 09:43:50 [core.py:1200] RuntimeError: Worker failed with error 'Connection reset "
        "by peer', please check the stack trace above for the root cause\n",
    }  # fmt: skip
    return report(files, "crash", may_name=[1], must_name=True, mentions=["rank 1"])


def offline_never_ends() -> Report:
    """The job has printed all of its output.

    Each front end joins its engine at exit, and no process is in a collective.
    """
    queue = [
        "wait (threading.py:355)",
        "get (queue.py:180)",
        "_process_input_queue (vllm/v1/engine/core.py:1100)",
        "run_busy_loop (vllm/v1/engine/core.py:1080)",
    ]
    joined = [
        "poll (multiprocessing/popen_fork.py:27)",
        "join (multiprocessing/process.py:149)",
        "_exit_function (multiprocessing/util.py:360)",
    ]
    files: Files = {}
    for rank in range(2):
        files[f"front{rank}.txt"] = py_spy("python offline_dp.py", joined, 50 + rank)
        files[f"engine{rank}.txt"] = py_spy(f"VLLM::EngineCore_DP{rank}", queue, 60 + rank)
        files[f"worker{rank}.txt"] = py_spy(f"VLLM::Worker_DP{rank}_EP{rank}", IDLE, 70 + rank)
    return report(files, "inconclusive", "clean", mentions=["idle", "exit", "the program never ends"])


def healthy_idle_server() -> Report:
    """SGLang's schedulers poll for requests in both looks, and RAS is OK."""
    poll = [
        "recv_requests (sglang/srt/managers/scheduler.py:900)",
        "event_loop_overlap (sglang/srt/managers/scheduler.py:700)",
        "run_scheduler_process (sglang/srt/managers/scheduler.py:2500)",
    ]
    files: Files = {
        f"t{look}/tp{r}.txt": py_spy(f"sglang::scheduler_TP{r}", poll, 10 + r) for r in range(4) for look in range(2)
    }
    files |= {f"ras_{n}.txt": ras("OK", ranks=4) for n in (1, 2)}
    return report(files, "inconclusive", "clean")


def xid_before_an_oom() -> Report:
    """A GPU failed (Xid); half a minute later another rank ran out of memory. NCCL's log shows whose GPU it was."""
    init = "".join(
        f"node-a:{100 + r}:{200 + r} [{r}] NCCL INFO ncclCommInitRankConfig comm 0x5{r} rank {r} nranks 4 cudaDev {r} nvmlDev {r} "
        f"busId {0x5D + r:x}000 commId 0x77 - Init COMPLETE\n"
        for r in range(4)
    )
    files: Files = {
        "nccl.log": init,
        "dmesg_node-a.txt": "[Sat Nov 28 09:43:00 2026] NVRM: Xid (PCI:0000:5f:00): 79, pid=102, name=python, GPU has fallen off the bus.\n",
        "rank1.log": "[rank1]:[E1128 09:43:30.05 x.cpp:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB.\n",
        "rank0.log": watchdog(0, 9, "ALLREDUCE").replace("E1003 11:42", "E1128 09:53"),
    }  # fmt: skip
    return report(files, "crash", may_name=[2], must_name=True, mentions=["Xid 79"])


def old_wording_in_a_subgroup() -> Report:
    """torch 2.3: rank 1 of a tensor-parallel pair is rank 7 of the job; "last completed" is garbage."""
    stamp = "[rank7]:[E ProcessGroupNCCL.cpp:563] "
    work = "WorkNCCL(SeqNum=3, OpType=ALLREDUCE, NumelIn=8, NumelOut=8, Timeout(ms)=600000) ran for 600410 milliseconds before timing out."
    files: Files = {
        "job.log": f"{stamp}[Rank 1] Watchdog caught collective operation timeout: {work}\n"
        f"[rank7]:[E ProcessGroupNCCL.cpp:1537] [PG 5 Rank 1] Timeout at NCCL work: 3, last enqueued NCCL work: 3, last completed NCCL work: 3452013982.\n",
    }
    return report(files, "inconclusive", "stall", mentions=["rank 7"])


def three_wait_on_the_device_one_loads_data() -> Report:
    """gdb and pystack of a Megatron job: three ranks synchronise with the device, and one waits for its data loader."""
    gdb = (
        'Thread 1 (Thread 0x7f01 (LWP {pid}) "python"):\n#0  0x00007f in sched_yield () at ../sysdeps/unix/syscall-template.S:120\n'
        "#1  0x00007f in ?? () from /usr/lib/x86_64-linux-gnu/libcuda.so.1\n#2  0x00007f in cuStreamSynchronize () from /usr/lib/x86_64-linux-gnu/libcuda.so.1\n"
        "#3  0x00007f in cudaStreamSynchronize () from /usr/local/cuda/lib64/libcudart.so.12\n\n"
    )
    pystack = (
        "Traceback for thread 9 (python) [] (most recent call last):\n"
        '    (Python) File "/app/pretrain_gpt.py", line 12, in <module>\n'
        '    (Python) File "/app/megatron/training/training.py", line 700, in train_step\n'
        '    (Python) File "/usr/lib/python3/dist-packages/torch/utils/data/dataloader.py", line 1295, in _get_data\n'
        '    (Python) File "/usr/lib/python3.12/queue.py", line 180, in get\n'
    )
    files: Files = {f"gdb_rank{r}.txt": gdb.format(pid=40 + r) for r in (0, 1, 3)}
    files["pystack_rank2.txt"] = pystack
    return report(files, "inconclusive", "slow", may_name=[2], mentions=["rank 2", "data"])


def two_moments() -> Report:
    """In the first dumps rank 2 has not queued #10.

    A minute later all ranks are done with it, but rank 1 has not queued #20.
    """
    groups = {"1": ("ep", [0, 1, 2, 3])}

    def entries(upto: int, done: int, at_ms: int) -> list[dict[str, object]]:
        return [call(n, "all_reduce", done=n <= done, at_ms=n * 100 + at_ms * (n > 10)) for n in range(1, upto + 1)]

    files: Files = {}
    for rank in range(4):
        files[f"first/trace_rank_{rank}"] = dump(entries(9 if rank == 2 else 10, 9, 0), groups)
        files[f"second/trace_rank_{rank}"] = dump(entries(19 if rank == 1 else 20, 19, 60_000), groups)
    return report(files, "inconclusive", "deadlock", "slow", may_name=[1], mentions=["#20", "rank 1"])


def tensorrt_hang() -> Report:
    """TensorRT-LLM's watchdog names the rank on which it runs; then MPI_Abort ends all ranks."""
    files: Files = {
        "run.log": "[11/28/2026-09:43:49] [TRT-LLM] [RANK 1] [E] Hang detected after 300 seconds.\n"
        "[11/28/2026-09:43:49] [TRT-LLM] [RANK 1] [E] Hang detected on rank 1 in PyExecutor.\n"
        "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 137.\n",
    }
    return report(files, "inconclusive", mentions=["stacks"])


def ray_left_lines_out() -> Report:
    """Ray shows the time-out of two of eight workers and leaves out six lines."""
    line = (
        "(WorkerDict pid={pid}) [rank{r}]:[E1128 09:43:0{r}.05 ProcessGroupNCCL.cpp:629] [Rank {r}] Watchdog caught collective "
        "operation timeout: WorkNCCL(SeqNum=77, OpType=ALLREDUCE, NumelIn=64, NumelOut=64, Timeout(ms)=600000) ran for 600021 "
        "milliseconds before timing out.{more}\n"
    )
    files: Files = {
        "driver.log": line.format(pid=71, r=1, more="")
        + line.format(pid=75, r=5, more=" [repeated 6x across cluster]"),
    }
    return report(files, "inconclusive", "stall", mentions=["repeated"])


def deepep_at_teardown() -> Report:
    """A healthy run prints DeepEP's time-out during shutdown."""
    files: Files = {
        "rank6.log": "INFO 11-28 09:43:49 [serve.py:1] all 100 requests are done\n"
        "DeepEP timeout check failed: rank = 6, thread = 5, value = 1024)\n",
    }
    return report(files, "inconclusive", "clean")


def ras_with_a_dead_process() -> Report:
    """RAS cannot reach a process and reports it dead.

    Nothing shows why the process ended, or whether it was the first.
    """
    text = ras("INCOMPLETE", ranks=8).replace(
        "Warnings\n", "DEAD\n  1 job process is considered dead (unreachable via the RAS network)\n"
        "  Process 323032 on node 10.1.2.3 managing GPU 4\n\n#0-0 (12a1b02d15a8bb89) INCOMPLETE\n  Missing communicator data from 1 job process\n"
        "  Process 323032 on node 10.1.2.3 managing GPU 4\n\nWarnings\n",
    )  # fmt: skip
    return report({"ras.txt": text}, "inconclusive", "crash", mentions=["dead"])


def watchdog_dump_files_of_vllm() -> Report:
    """vLLM 0.33 writes faulthandler's stacks into one file for each process, named by the worker's number in its
    engine.
    """
    inside = (
        "Timeout (0:05:00)!\nThread 0x00007eff787c8640 [DeathPipeMonitor] (most recent call first):\n"
        '  File "/usr/lib/python3.12/multiprocessing/connection.py", line 395 in _recv\n\n'
        "Thread 0x00007eff787c9640 [MainThread] (most recent call first):\n"
        '  File "/usr/lib/python3/dist-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce\n'
        '  File "/usr/lib/python3/dist-packages/vllm/v1/worker/dp_utils.py", line 75 in _run_ar\n'
    )
    files: Files = {f"VLLM_STACK_DUMP_for_worker_{r}_{4242 + r}.log": inside for r in range(2)}
    return report(files, "inconclusive", mentions=["all_reduce", "4242"])


def plain_torch_without_ranks() -> Report:
    """py-spy of four processes that torchrun started: no title, file or line says which rank is which."""
    inside = [f"all_reduce ({C10D}:3252)", "step (train.py:40)", "main (train.py:90)"]
    files: Files = {
        f"stack_{40 + n}.txt": py_spy(
            "/usr/bin/python3 train.py", inside if n != 2 else ["load (data.py:3)", "main (train.py:80)"], 40 + n
        )
        for n in range(4)
    }
    return report(files, "inconclusive", mentions=["process", "all_reduce", "load (data.py:3)", "/proc/"])


def torchcomms_one_is_absent() -> Report:
    """TorchComms has the group's name in place of the backend, and only `retired` shows which operations are over."""
    groups = {"7": ("moe", [0, 1, 2, 3])}
    files: Files = {}
    for rank in range(4):
        upto = 4 if rank == 3 else 5
        entries = [call(n, "all_to_all", group=(7, "7", "moe"), backend="moe", done=n < 5) for n in range(1, upto + 1)]
        files[f"comm_lib_trace_rank_{rank}"] = dump(entries, groups)
    return report(files, "inconclusive", "deadlock", may_name=[3], mentions=["rank 3"])


def ascend_time_out() -> Report:
    """HCCL copies the watchdog's text. All ranks are in the same operation."""
    rows = "".join(watchdog(r, 12, "ALLREDUCE") for r in range(8)).replace("NCCL", "HCCL")
    return report({"job.log": rows}, "stall", "inconclusive", mentions=["#12"])


REPORTS: dict[str, Callable[[], Report]] = {
    it.__name__: it
    for it in (
        skipped_dummy_once, skipped_dummy_twice, straggler_in_the_model, killed_worker, offline_never_ends,
        healthy_idle_server, xid_before_an_oom, old_wording_in_a_subgroup, three_wait_on_the_device_one_loads_data,
        two_moments, tensorrt_hang, ray_left_lines_out, deepep_at_teardown, ras_with_a_dead_process,
        watchdog_dump_files_of_vllm, plain_torch_without_ranks, torchcomms_one_is_absent, ascend_time_out,
    )
}  # fmt: skip
