"""Readers of foreign formats: each wording and version to the same records, and nothing that a stranger's file can
break.
"""

from __future__ import annotations

import io
import pickle
import random
import zipfile

import pytest
from foreign import call, dump, py_spy, ras, watchdog, write

from repro.ingest import flight_recorder, pickles, prefix, processes, stacks
from repro.ingest.activities import activity_of
from repro.ingest.read import _records, read
from repro.trace.observed import Failure, Mismatch, Note, Process, Progress, RasAnswer, RecorderDump, Stack, TimedOut


def records(text, name="rank_3.log"):
    return _records(io.BytesIO(text.encode()), name)


@pytest.mark.parametrize(
    ("name", "rank"),
    [("nccl_trace_rank_7", 7), ("comm_lib_trace_rank_12", 12), ("rank0.json", 0), ("_dump_15", 15),
     ("trace_rank_host_5.pkl", 5), ("x/node3/rank_4", 4), ("rank_1.trace.json", 1), ("dump", None)],
)  # fmt: skip
def test_the_rank_of_a_dump_stands_in_its_name(name, rank):
    assert flight_recorder.rank_of(name) == rank


@pytest.mark.parametrize("as_json", [True, False])
def test_a_dump_is_read_alike_as_pickle_and_as_json(as_json):
    data = dump(
        [call(1, "_all_gather_base"), call(2, "all_reduce", done=False)],
        {"1": ("ep", [4, 5])},
        {"1": (2, 1)},
        as_json=as_json,
    )
    read_dump = flight_recorder.read(data, "trace_rank_5")
    (record,) = read_dump.groups
    assert (read_dump.rank, record.group.members, record.enqueued, record.completed) == (5, (4, 5), 2, 1)
    assert [(c.op, c.seq, c.done) for c in record.calls] == [("all_gather", 1, True), ("all_reduce", 2, False)]


def test_what_stands_before_a_completed_operation_of_nccl_is_over():
    entries = [call(1, "all_reduce", done=False), call(2, "ALLGATHER_coalesced"), call(3, "all_reduce", done=False)]
    (record,) = flight_recorder.read(dump(entries, {"1": ("ep", [0, 1])}), "r0").groups
    assert [c.done for c in record.calls] == [True, True, False]


def test_an_operation_that_its_time_out_retired_is_not_over():
    entry = call(1, "all_reduce", done=False) | {"retired": True}
    (record,) = flight_recorder.read(dump([entry], {"1": ("ep", [0, 1])}), "r0").groups
    assert not record.calls[0].done


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (write, (tmp_path / "ran", {"x": "y"}))

    with pytest.raises(pickles.UnsafePickle, match=r"foreign\.write"):
        pickles.load(pickle.dumps(Evil(), protocol=2))
    assert not (tmp_path / "ran").exists()


def test_nine_bytes_that_ask_for_gigabytes_are_refused():
    with pytest.raises(ValueError, match=r"memory|readable"):
        pickles.load(b"\x80\x02Nr\xff\xff\xff\x7f.")


@pytest.mark.parametrize(
    ("line", "rank", "group_rank"),
    [
        ("[E ProcessGroupNCCL.cpp:474] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=1, OpType=ALLREDUCE, "
         "Timeout(ms)=120000) ran for 120621 milliseconds before timing out.", None, 1),
        ("[rank7]:[E ProcessGroupNCCL.cpp:563] [Rank 3] Watchdog caught collective operation "
        "timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE, "
         "NumelIn=1, NumelOut=1, Timeout(ms)=5000) ran for 5001 milliseconds before timing out.", 7, 3),
        ("\x1b[36m(RayWorkerWrapper pid=4009, ip=10.0.0.1)\x1b[0m [rank12]:[E604 "
        "03:20:01.264313340 ProcessGroupNCCL.cpp:632] [Rank 0] Watchdog "
         "caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE, NumelIn=1, "
        "NumelOut=1, Timeout(ms)=5000) ran for 5001 "
         "milliseconds before timing out.", 12, 0),
    ],
)  # fmt: skip
def test_a_watchdog_line_of_every_version_gives_rank_and_group_rank_apart(line, rank, group_rank):
    (found,) = records(line + "\n", "job.log")
    assert isinstance(found, TimedOut)
    assert (found.rank, found.group_rank, found.call.op, found.call.seq) == (rank, group_rank, "all_reduce", 1)


def test_an_unpadded_month_is_read_right():
    june = prefix.time_of("[rank0]:[E604 03:20:01.264313340 X.cpp:1] ")
    december = prefix.time_of("[rank0]:[E1206 03:20:01.26 X.cpp:1] ")
    march = prefix.time_of("[rank0]:[E321 03:20:01.26 X.cpp:1] ")
    assert march < june < december
    assert prefix.time_of("[rank0]:[E1399 03:20:01.26 X.cpp:1] ") is None


def test_the_start_of_a_wait_is_its_end_less_its_time():
    timed_out, progress = records(watchdog(3, 9, "ALLREDUCE", queued=12))
    assert timed_out.at_s - timed_out.since_s == pytest.approx(600.021)
    assert isinstance(progress, Progress) and (progress.enqueued, progress.completed) == (12, 8)


def test_garbage_counters_count_as_none():
    line = (
        "[rank7]:[E ProcessGroupNCCL.cpp:565] [PG 0 Rank 7] Timeout at NCCL work: 1, last "
        "enqueued NCCL work: 1, last completed NCCL work: 3452013982.\n"
    )
    (progress,) = records(line)
    assert (progress.enqueued, progress.completed) == (1, None)


def test_detail_gives_both_sides():
    line = (
        "RuntimeError: Detected mismatch between collectives on ranks. Rank 1 is running "
        "collective: CollectiveFingerPrint(SequenceNumber=31, "
        "OpType=ALLREDUCE, TensorShape=[10], TensorDtypes=BFloat16, "
        "TensorDeviceTypes=TensorOptions(dtype=float (default), device=cuda)), but "
        "Rank 0 is running collective: "
        "CollectiveFingerPrint(SequenceNumber=31OpType=BARRIER).Collectives differ in the "
        "following aspects: \t "
        "Op type: ALLREDUCEvs BARRIER\n"
    )
    (found,) = records(line)
    assert isinstance(found, Mismatch) and (found.rank, found.other) == (1, 0)
    assert (found.call.op, found.call.sizes, found.other_call.op, found.other_call.seq) == (
        "all_reduce",
        ((10,),),
        "barrier",
        31,
    )


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "memory"),
        ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", "device"),
        (
            "[ 12.5] NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
            "device",
        ),
        ("[ 9.1] Memory cgroup out of memory: Killed process 4242 (python) total-vm:1kB, anon-rss:2kB", "killed"),
        ("RuntimeError: [/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:41822", "consequence"),
        ("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.", "consequence"),
        ("KeyError: 'model.layers.0'", "exception"),
    ],
)
def test_errors_are_told_from_what_follows_from_them(line, kind):
    kinds = {found.kind for found in records(line + "\n") if isinstance(found, Failure)}
    assert kinds == {kind}


def test_an_answer_of_ras_gives_counts_by_rank():
    text = ras(
        "MISMATCH",
        [
            "Rank 0 has launched up to operation 2654 -- GPU 0 managed by process 9 on node a",
            "Rank 1 has launched up to operation 2655 -- GPU 0 managed by process 8 on node b",
        ],
        2,
    )
    (answer,) = records(text, "ras.txt")
    assert isinstance(answer, RasAnswer) and answer.communicators[0].launched == {"AllGather": {0: 2654, 1: 2655}}


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


def test_files_folders_and_zips_are_read_in_any_mixture_and_the_rest_is_listed(tmp_path):
    write(tmp_path / "folder", {"rank_0.log": watchdog(0, 3, "ALLREDUCE"), "noise.bin": b"\0\0", "expect.json": "{}"})
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("trace_rank_1", dump([call(1, "all_reduce")], {"1": ("ep", [0, 1])}))
    evidence = read([tmp_path / "folder", tmp_path / "more.zip"])
    assert {type(record) for record in evidence.records} == {TimedOut, Progress, RecorderDump}
    assert evidence.files == ["rank_0.log", "more.zip/trace_rank_1"] and [
        line.split(":")[0] for line in evidence.not_understood
    ] == ["noise.bin"]


def test_a_line_that_a_cut_file_ends_in_is_not_read(tmp_path):
    evidence = read([write(tmp_path, {"a.log": "[rank0]: RuntimeError: [/x/gloo/tr"})])
    assert evidence.records == []


def test_a_last_line_of_a_log_that_ends_there_is_read_with_its_end(tmp_path):
    evidence = read([write(tmp_path, {"a.log": "KeyError: 'x'\n"})])
    assert [type(record) for record in evidence.records] == [Failure]


def test_a_heartbeat_is_a_note_and_not_a_failure():
    (note,) = records(
        "(EngineCore pid=7) INFO 02-11 09:17:19 [s.py:802] No available shared memory broadcast "
        "block found in 60 seconds.\n"
    )
    assert isinstance(note, Note) and note.kind == "heartbeat"


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_to_a_file_ends_a_reader(seed):
    rng = random.Random(seed)
    samples = [
        (
            "trace_rank_0",
            dump([call(n, "all_reduce", frames=[("f", "x.py", 1)]) for n in range(5)], {"1": ("ep", [0, 1])}),
        ),
        ("rank_0.json", dump([call(1, "all_reduce")], {"1": ("ep", [0, 1])}, as_json=True)),
        ("rank_1.log", watchdog(1, 5, "ALLREDUCE").encode()),
        ("s.txt", py_spy("VLLM::Worker_TP0", ["acquire (filelock/_api.py:344)"]).encode()),
        ("ras.txt", ras("MISMATCH", ["Rank 0 has launched up to operation 5 -- x"]).encode()),
    ]
    for number in range(400):
        name, data = rng.choice(samples)
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 3, 20))):
            place = rng.randrange(len(damaged) + 1)
            damaged[place : place + rng.choice((0, 1, 5))] = rng.randbytes(rng.choice((0, 1, 4)))
        try:
            found = _records(io.BytesIO(bytes(damaged)), name)
        except ValueError:
            continue
        assert all(isinstance(record, Stack) or record for record in found), f"seed {seed}, input {number}"
