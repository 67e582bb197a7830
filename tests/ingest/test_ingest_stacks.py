"""Stacks of every tool to frames, innermost first; titles to ranks; frames to what a thread does."""

from __future__ import annotations

import io
import tomllib
from pathlib import Path

import pytest

from repro.ingest.logs import log as logs
from repro.ingest.names import processes
from repro.ingest.stacks import activities
from repro.ingest.stacks import dumps as stacks
from repro.ingest.stacks.activities import activity_of
from repro.trace.foreign.records import Process, Stack


@pytest.mark.parametrize(
    ("title", "rank", "role"),
    [("VLLM::Worker_TP3", 3, "worker"), ("VLLM::Worker_DP7_EP7", 7, "worker"), ("VLLM::EngineCore_DP2", 2, "engine"),
     ("sglang::scheduler_DP0_TP3_EP3", 3, "worker"), ("VLLM::EngineCore", None, "engine"),
     ("VLLM::Worker_PP1_TP3", None, "worker"),
     ("python serve.py", None, "")],
)  # fmt: skip
def test_titles_give_ranks_only_where_they_are_global(title, rank, role):
    assert processes.process_of(title=title) == Process(None, title, rank, role)


@pytest.mark.parametrize(
    ("frames", "activity"),
    [
        (("wait (file_baton.py:47)", "load (torch/utils/cpp_extension.py:1)"), "lock"),
        (("LockAcquisition._poll_until_acquired (filelock/_core/_acquire.py:177)",), "lock"),
        (("_try_wait (subprocess.py:2011)", "run_ninja (flashinfer/jit/cpp_ext.py:310)"), "building"),
        (("all_reduce (torch/distributed/distributed_c10d.py:3252)", "forward (m.py:1)"), "collective"),
        (("sched_yield (libc.so.6)", "ncclAllGather (libnccl.so.2)"), "collective"),
        (("cuEventSynchronize (libcuda.so.1)",), "device"),
        (("_recv (multiprocessing/connection.py:395)", "_try_get_data (torch/utils/data/dataloader.py:1)"), "data"),
        (("forward (model.py:12)",), ""),
    ],
)
def test_frames_tell_what_a_thread_does(frames, activity):
    assert activity_of(frames)[0] == activity


THREADS = {
    "py-spy, with locals": (
        """Process 4242: VLLM::Worker_DP1_TP2_EP6
Python v3.12.13 (/usr/bin/python3.12)

Thread 4242 (idle): "MainThread"
    acquire (filelock/_api.py:344)
        Arguments:
            self: <UnixFileLock at 0x7f>
        Locals:
            lock_filename: "/root/.cache/a.lock"
    0x7f1234 (libcuda.so.1)
    std::function<void ()>::operator()() const (libtorch.so)
    main (x.py:1)
Thread 4243 (active+gil): "Thread-1 (run)"
    run (threading.py:1012)
after it a line of a log
    and one that is indented
""",
        ["6 4242 MainThread acquire (filelock/_api.py:344) 4 lock", "6 4242 Thread-1 (run) run (threading.py:1012) 1 "],
    ),
    "faulthandler": (
        """Thread 0x00007eff787c8640 (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 359 in wait
  ...

Current thread 0x00007eff787c8641 (most recent call first):
  File "/v/lib/python3.12/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "x.py", line 1 in <module>

Thread 0x00007eff787c8642 (most recent call first):
  <no Python frame>
""",
        [
            "1 None  wait (/usr/lib/python3.12/threading.py:359) 1 ",
            "1 None MainThread all_reduce (torch/distributed/distributed_c10d.py:3252) 2 collective",
        ],
    ),
    "faulthandler, with the names that the system shows": (
        """Current thread 0x00007eff787c8641 [VLLM::Worker_TP] (most recent call first):
  File "x.py", line 8 in f
  File "x.py", line 1 in <module>
""",
        ["1 None MainThread f (x.py:8) 2 "],
    ),
    "gdb": (
        """[New LWP 4124]
Thread 2 (Thread 0x7f12 (LWP 4124) "pt_nccl_watchdg"):
#0  0x00007f in __GI___clock_nanosleep (clock_id=1) at ../sysdeps/unix/sysv/linux/clock_nanosleep.c:78

Thread 1 (Thread 0x7f12aa (LWP 4123) "VLLM::Worker"):
#0  0x00007f in sched_yield () at ../sysdeps/unix/syscall-template.S:120
#1  0x00007f1 in ?? () from /usr/lib/x86_64-linux-gnu/libcuda.so.1
#2  0x00007f2 in c10::cuda::CUDAStream::synchronize() const (this=0x7ff (a)) from /x/libc10_cuda.so
""",
        [
            "1 None pt_nccl_watchdg __GI___clock_nanosleep (../sysdeps/unix/sysv/linux/clock_nanosleep.c) 1 sleep",
            "1 None MainThread sched_yield (../sysdeps/unix/syscall-template.S) 3 device",
        ],
    ),
    "pystack": (
        """Traceback for thread 4242 (python3) [Has the GIL] (most recent call last):
    (Python) File "/home/u/x.py", line 12, in <module>
        main()
    (Python) File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3252, in all_reduce
        work.wait()
      Locals:
        lock_file: "/tmp/x.lock"
    (C) File "???", line 0, in ncclAllReduce (/usr/lib/libnccl.so.2)

Traceback for thread 4243 (pt_watch) [] (most recent call last):
    (C) File "???", line 0, in clone (libc.so.6)
""",
        [
            "1 None MainThread ncclAllReduce (/usr/lib/libnccl.so.2) 3 collective",
            "1 None pt_watch clone (libc.so.6) 1 ",
        ],
    ),
    "SGLang's log": (
        """[2026-08-04 11:58:42 TP1] Pyspy dump for PID 142 (py-spy dump --native --pid 142):
Process 142: sglang::scheduler_TP1
Python v3.12.3 (/usr/bin/python3.12)

Thread 142 (active): "MainThread"
    sched_yield (libc.so.6)
    ncclAllGather (libnccl.so.2)

[2026-08-04 11:58:43 TP0] Pyspy dump for PID 141:
Thread 141 (idle): "MainThread"
    recv_requests (sglang/srt/managers/scheduler.py:1)
""",
        [
            "1 142 MainThread sched_yield (libc.so.6) 2 collective",
            "0 141 MainThread recv_requests (sglang/srt/managers/scheduler.py:1) 1 ",
        ],
    ),
    "a log with the writer before each line": (
        """(EngineCore_DP0 pid=1440) Process 1512: VLLM::Worker_TP3
(EngineCore_DP0 pid=1440) Thread 1512 (idle): "MainThread"
(EngineCore_DP0 pid=1440)     acquire (filelock/_api.py:344)
(EngineCore_DP0 pid=1440)     main (x.py:1)
(EngineCore_DP0 pid=1440) INFO 10-22 09:43:49 [core.py:466] more
""",
        ["3 1512 MainThread acquire (filelock/_api.py:344) 2 lock"],
    ),
    "torchrun's log": (
        """[rank7]: Thread 0x00007eff787c8640 (most recent call first):
[rank7]:   File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3252 in barrier
[rank7]:   File "x.py", line 1 in <module>
""",
        ["7 None MainThread barrier (torch/distributed/distributed_c10d.py:3252) 2 collective"],
    ),
    "TensorRT-LLM's log": (
        """[11/26/2025-03:04:11] [TRT-LLM] [RANK 5] [E] Hang detected on rank 5 in PyExecutor.
[11/26/2025-03:04:11] [TRT-LLM] [RANK 5] [E] Thread 139 stack trace:
  File "/usr/lib/python3.12/threading.py", line 1032, in _bootstrap
    self._bootstrap_inner()
  File "/v/dist-packages/tensorrt_llm/_torch/pyexecutor/py_executor.py", line 88, in _executor_loop
    self._gather()
  File "/v/dist-packages/mpi4py/util/pkl5.py", line 12, in allgather
    x()
[11/26/2025-03:04:11] [TRT-LLM] [RANK 5] [I] more
""",
        ["5 None MainThread allgather (mpi4py/util/pkl5.py:12) 3 collective"],
    ),
}


@pytest.mark.parametrize("tool", THREADS)
def test_stacks_of_every_tool_give_the_innermost_frame_first(tool):
    text, expected = THREADS[tool]
    rows = [row for row in logs.read(io.BytesIO(text.encode()), "rank1.txt") if isinstance(row, Stack)]
    assert [
        f"{row.process.rank} {row.process.pid} {row.thread} {row.frames[0]} {len(row.frames)} {row.activity}"
        for row in rows
    ] == expected


def test_a_lock_file_among_the_local_variables_is_named_in_text_and_json():
    text = THREADS["py-spy, with locals"][0]
    content = [{
        "pid": 4242, "thread_name": "MainThread", "process_info": {"pid": 4242, "command_line": "VLLM::Worker_TP3"},
        "frames": [{"name": "acquire", "short_filename": "filelock/_api.py", "line": 344,
                    "locals": [{"name": "lock_filename", "repr": '"/root/.cache/a.lock"'}]}],
    }]  # fmt: skip
    in_text = next(iter(logs.read(io.BytesIO(text.encode()), "a.txt")))
    (in_json,) = stacks.read_json(content, "a.json")
    assert in_text.detail == in_json.detail == "a file lock (filelock): /root/.cache/a.lock"
    assert (in_json.process.rank, in_json.process.pid) == (3, 4242)


@pytest.mark.parametrize(
    "line",
    [
        "Error: Permission denied (os error 13)",
        "Error: Failed to copy PyVersion symbol",
        "ptrace: Operation not permitted.",
    ],
)
def test_a_tool_that_could_not_look_is_noted(line):
    (note,) = logs.read(io.BytesIO(f"{line}\n".encode()), "pyspy_rank3.txt")
    assert (note.kind, note.process.rank) == ("unreadable", 3)


ROWS = tomllib.loads((Path(activities.__file__).parent / "activities.toml").read_text(encoding="utf-8"))["row"]


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_each_row_of_the_table_of_activities_is_the_one_for_its_sample(index):
    assert activities.row_of(tuple(ROWS[index]["sample"])) == index, ROWS[index]["detail"]


@pytest.mark.parametrize(
    ("frames", "activity"),
    [
        (("cuStreamSynchronize (libcuda.so.1)", "_fn (torch/_dynamo/eval_frame.py:1)", "f (m.py:1)"), "device"),
        (("cuLaunchKernel (libcuda.so.1)", "run (triton/runtime/jit.py:733)", "f (m.py:1)"), "device"),
        (("all_reduce (torch/distributed/distributed_c10d.py:1)", "__call__ (torch/_inductor/output_code.py:1)"), "collective"),
        (("cuStreamSynchronize (libcuda.so.1)", "__call__ (torch/_inductor/codecache.py:1)"), "device"),
        (("f (m.py:1)", "benchmark (train.py:4)"), ""),
        (("readline (http/client.py:4)", "f (m.py:1)"), ""),
        (("wait (subprocess.py:1)", "build_model (train.py:4)"), ""),
    ],
)  # fmt: skip
def test_frames_of_a_program_that_runs_are_no_build(frames, activity):
    assert activities.activity_of(frames)[0] == activity


def test_the_import_of_the_compiler_is_no_compilation():
    frames = (
        "<module> (torch/_dynamo/convert_frame.py:1)",
        "<lambda> (torch/_inductor/graph.py:2)",
        "main (train.py:3)",
    )
    assert activity_of(frames) == ("", "")
    assert activity_of(("convert (torch/_dynamo/convert_frame.py:1)", *frames))[0] == "compiling"


def test_a_child_of_multiprocessing_waits_for_no_queue_because_of_how_it_began():
    start = ("Popen._launch (multiprocessing/popen_fork.py:71)", "Popen.__init__ (multiprocessing/popen_fork.py:19)")
    assert activity_of(("step (train.py:3)", "run (multiprocessing/process.py:108)", *start)) == ("", "")
    assert (
        activity_of(("Connection._recv (multiprocessing/connection.py:383)", "step (train.py:3)", *start))[0] == "queue"
    )


@pytest.mark.parametrize(
    ("call", "passed", "variables", "peer"),
    [
        ("recv", "", {"src": "3", "group_src": "None"}, 3),
        ("recv", "", {"src": "None", "group_src": "3"}, 3),  # in the default group both numbers are the same
        ("send", "'group': <torch.distributed.ProcessGroup at 0x7f01>", {"dst": "5", "group_dst": "1"}, 5),
        ("send", "'group': <torch.distributed.ProcessGroup at 0x7f01>", {"dst": "None", "group_dst": "1"}, None),
    ],
)
def test_the_peer_of_a_send_or_receive_is_a_global_rank_or_unknown(call, passed, variables, peer):
    def frame(name, file, **found):
        rows = [{"name": variable, "repr": text} for variable, text in found.items()]
        return {"name": name, "filename": file, "line": 9, "locals": rows}

    torch = "/x/torch/distributed"
    frames = [
        frame("wait", f"{torch}/distributed_c10d.py"),
        frame(call, f"{torch}/distributed_c10d.py", **variables),
        frame("wrapper", f"{torch}/c10d_logger.py", args="(<Tensor at 0x7f02>)", kwargs="{" + passed + "}"),
        frame("exchange", "/app/train.py", pair="<torch.distributed.ProcessGroup at 0x7f01>"),
    ]
    (stack,) = stacks.read_json([{"pid": 7, "thread_name": "MainThread", "frames": frames}], "rank0.json")
    assert (stack.detail, stack.peer) == (call, peer), stack
    assert stack.group == ("pair in exchange" if passed else "default"), stack
