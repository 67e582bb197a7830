"""Stacks of every tool to frames, innermost first; titles to ranks; frames to what a thread does."""

from __future__ import annotations

import pytest
from foreign import py_spy

from repro.ingest import processes, stacks
from repro.ingest.activities import activity_of
from repro.trace.observed import Process


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


def test_stacks_of_all_tools_give_the_innermost_frame_first():
    spy = py_spy("VLLM::Worker_TP1", ["acquire (filelock/_api.py:344)", "main (x.py:1)"])
    fault = (
        "Current thread 0x00007f (most recent call first):\n  File "
        '"/v/site-packages/filelock/_api.py", line 344 in acquire\n  File "x.py", line 1 in '
        "main\n"
    )
    gdb = (
        'Thread 1 (Thread 0x7f12 (LWP 4123) "python"):\n#0  0x7f in sched_yield () from '
        "/lib/libc.so.6\n#1  0x7f in ?? () from /usr/lib/libcuda.so.1\n"
    )
    for text, innermost in (
        (spy, "acquire (filelock/_api.py:344)"),
        (fault, "acquire (filelock/_api.py:344)"),
        (gdb, "sched_yield (/lib/libc.so.6)"),
    ):
        (stack,) = stacks.read(enumerate(text.splitlines(), 1), "rank1.txt")
        assert stack.frames[0] == innermost and len(stack.frames) == 2
