"""Lines of logs: each wording of each tool and version gives the records that it supports, and no more."""

from __future__ import annotations

import io

import pytest
from foreign import watchdog

from repro.ingest.logs import prefix
from repro.ingest.read import _records
from repro.trace.foreign.records import Failure, Left, Mismatch, Note, Progress, TimedOut

GLOG = "E1126 03:04:11.061727749 ProcessGroupNCCL.cpp:1834"
WORK = "SeqNum=7, OpType=ALLREDUCE, NumelIn=8, NumelOut=8, Timeout(ms)=600000"
CAUGHT = (
    f"Watchdog caught collective operation timeout: WorkNCCL({WORK}) ran for 600021 milliseconds before timing out."
)
TENSORS = (
    "TensorDtypes=Float, TensorDeviceTypes=TensorOptions(dtype=float (default), device=cpu, layout=Strided (default))"
)


def shown(record):
    """A record in one line: its kind, the ranks (global/of the group), and what it says."""
    match record:
        case TimedOut():
            call, group = record.call, f" of {record.group.name}" if record.group else ""
            return f"timeout {record.rank}/{record.group_rank} {call.op} {call.seq}{group}, {record.ran_s:g} s"
        case Progress():
            name = f"{record.group.name}({record.group.description})"
            return (
                f"progress {record.rank}/{record.group_rank} {name} {record.enqueued} {record.completed} {record.stuck}"
            )
        case Failure():
            who = record.process.rank if record.process.rank is not None else record.process.pid or ""
            return f"{record.kind} {who}".strip()
        case Left():
            return "left"
        case Mismatch():
            other = f"{record.other}: {record.other_call.op} {record.other_call.seq}" if record.other_call else "?"
            return f"mismatch {record.rank}: {record.call.op} {record.call.seq} {list(record.call.sizes)} | {other}"
        case Note():
            return f"note {record.kind} {record.value}".strip()
        case _:
            return type(record).__name__


def records(text, name="job.log"):
    return [shown(record) for record in _records(io.BytesIO((text + "\n").encode()), name)]


def status(group, words, numbers="last enqueued NCCL work: 14, last completed NCCL work: 11."):
    return f"[rank9]:[{GLOG}] [{group}] {words}, {numbers}"


WATCHDOG = {
    "torch 1.12": (
        f"[E ProcessGroupNCCL.cpp:587] [Rank 3] {CAUGHT}".replace("SeqNum=7, ", ""),
        ["timeout None/3 all_reduce None, 600.021 s"],
    ),
    "torch 2.1": (f"[E ProcessGroupNCCL.cpp:474] [Rank 3] {CAUGHT}", ["timeout None/3 all_reduce 7, 600.021 s"]),
    "torch 2.2": (f"[rank9]:[E ProcessGroupNCCL.cpp:563] [Rank 3] {CAUGHT}", ["timeout 9/3 all_reduce 7, 600.021 s"]),
    "torch 2.4": (f"[rank9]:[{GLOG}] [Rank 3] {CAUGHT}", ["timeout 9/3 all_reduce 7, 600.021 s"]),
    "the group in front of it": (
        f"[rank9]:[{GLOG}] [PG ID 1 PG GUID 4(ep) Rank 3] {CAUGHT}",
        ["timeout 9/3 all_reduce 7 of 4, 600.021 s"],
    ),
    "Ray in front of it, in colour": (
        f"\x1b[36m(RayWorkerWrapper pid=40, ip=10.0.0.1)\x1b[0m [rank9]:[{GLOG}] [Rank 3] {CAUGHT}",
        ["note process", "timeout 9/3 all_reduce 7, 600.021 s"],
    ),
    "Ray, repeated": (
        f"(WorkerDict pid=40) [rank9]:[{GLOG}] [Rank 3] {CAUGHT} [repeated 6x across cluster]",
        ["note repeated 6", "note process", "timeout 9/3 all_reduce 7, 600.021 s"],
    ),
    "HCCL": (
        f"[rank9]:[E1126 03:04:11.06 compiler_depend.ts:444] [Rank 3] {CAUGHT}".replace("NCCL(", "HCCL("),
        ["timeout 9/3 all_reduce 7, 600.021 s"],
    ),
    "MCCL": (f"[rank9]:[{GLOG}] [Rank 3] {CAUGHT}".replace("NCCL", "MCCL"), ["timeout 9/3 all_reduce 7, 600.021 s"]),
    "CNCL": (f"[E X.cpp:1] [Rank 3] {CAUGHT}".replace("NCCL", "CNCL"), ["timeout None/3 all_reduce 7, 600.021 s"]),
    "blocking wait": (
        f"RuntimeError: [Rank 2] Work WorkNCCL({WORK}) timed out in blocking wait.",
        ["consequence", "timeout None/2 all_reduce 7, 600 s"],
    ),
    "torch 2.3 with garbage for none": (
        "[rank9]:[E ProcessGroupNCCL.cpp:565] [PG 0 Rank 7] Timeout at NCCL work: 1, last enqueued NCCL work: 1, "
        "last completed NCCL work: 3452013982.",
        ["progress 9/7 0() 1 None 1"],
    ),
    "torch 2.4, status": (
        status("PG 1 Rank 0", "Exception (either an error or timeout) detected by watchdog at work: 12"),
        ["progress 9/0 1() 14 11 12"],
    ),
    "torch 2.4, status with a description": (
        status("PG 0 (default_pg) Rank 3", "Exception (either an error or timeout) detected by watchdog at work: 12"),
        ["progress 9/3 0(default_pg) 14 11 12"],
    ),
    "torch 2.5, status": (
        status("PG ID 2 PG GUID 9 Rank 4", "Timeout at NCCL work: 12"),
        ["progress 9/4 9() 14 11 12"],
    ),
    "torch 2.6, status": (
        status(
            "PG ID 3 PG GUID 17(EXPERT_GROUP (x)) Rank 4", " failure detected by watchdog at work sequence id: 12 PG status: "
            "last enqueued work: 14, last completed work: 11"
        ).split(", last enqueued NCCL")[0],
        ["progress 9/4 17(EXPERT_GROUP (x)) 14 11 12"],
    ),
    "a dump asked for by another rank": (
        f"[rank9]:[{GLOG}] [PG ID 0 PG GUID 0(default_pg) Rank 9] Received a dump signal due to a collective timeout from  "
        "rank 1 and we will try our best to dump the debug info. Last enqueued NCCL work: 77, last completed NCCL work: 77.This "
        "is most likely caused by incorrect usages of collectives",
        ["note watchdog 1", "progress 9/9 0(default_pg) 77 77 None"],
    ),
    "a dump asked for by itself, of a group without work": (
        f"[rank9]:[{GLOG}] [PG ID 0 PG GUID 0 Rank 9] Received a dump signal due to a collective timeout from this local "
        "rank and we will try our best to dump the debug info. Last enqueued NCCL work: -1, last completed NCCL work: -1.",
        ["note watchdog own", "progress 9/9 0(default_pg) None None None"],
    ),
    "its own": (f"[rank9]:[{GLOG}] [PG ID 1 PG GUID 1 Rank 0] First PG on this rank to signal dumping.", ["note watchdog own"]),
    "another's": (
        f"[rank9]:[{GLOG}] [PG ID 0 PG GUID 0 Rank 0] Observed flight recorder dump signal from another rank via TCPStore.",
        ["note watchdog other"],
    ),
    "heartbeat": (
        f"[rank9]:[{GLOG}] [PG ID 0 PG GUID 0 Rank 0] Heartbeat monitor timed out! Process will be terminated after dumping "
        "debug info. workMetaList_.size()=2",
        ["note stuck"],
    ),
    "stuck": (
        f"[rank9]:[F{GLOG[1:]}] [PG ID 0 PG GUID 0 Rank 0] ProcessGroupNCCL's watchdog got stuck for 480 seconds without "
        "making progress in monitoring enqueued collectives.",
        ["note stuck"],
    ),
    "a device error that the watchdog met": (
        f"[rank9]:[{GLOG}] [PG ID 0 PG GUID 0 Rank 3] Process group watchdog thread terminated with exception: CUDA error: "
        "an illegal memory access was encountered",
        ["device 9"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("wording", WATCHDOG)
def test_each_wording_of_the_watchdog_gives_global_rank_and_group_rank_apart(wording):
    line, expected = WATCHDOG[wording]
    assert records(line) == expected


def test_a_time_out_belongs_to_the_group_that_the_watchdog_names_and_not_to_group_0():
    dump_signal = WATCHDOG["a dump asked for by another rank"][0].replace("rank9", "rank3")
    timeout, *_ = records(watchdog(3, 9, "ALLREDUCE", group="17(ep)") + dump_signal)
    assert timeout == "timeout 3/3 all_reduce 9 of 17, 600.021 s"


def test_a_time_out_whose_text_is_repeated_counts_once():
    line = f"[rank9]:[{GLOG}] [Rank 3] {CAUGHT}"
    again = f"[rank9]: RuntimeError: [PG 1 Rank 3] NCCL watchdog thread terminated with exception: [Rank 3] {CAUGHT}"
    assert [row for row in records(f"{line}\n{again}") if row.startswith("timeout")] == [
        "timeout 9/3 all_reduce 7, 600.021 s"
    ]


def test_a_time_out_is_read_from_the_abort_alone_where_its_own_line_is_missing():
    line = f"[rank9]: RuntimeError: NCCL communicator was aborted on rank 0.  Original reason for failure was: [Rank 0] {CAUGHT}"
    assert "timeout 9/0 all_reduce 7, 600.021 s" in records(line)


DETAIL = {
    "both sides": (
        "RuntimeError: Detected mismatch between collectives on ranks. Rank 1 is running collective: "
        f"CollectiveFingerPrint(SequenceNumber=31, OpType=ALLREDUCE, TensorShape=[10, 2], {TENSORS}), but Rank 0 is running "
        "collective: CollectiveFingerPrint(SequenceNumber=31OpType=BARRIER).Collectives differ in the following aspects: \t "
        "Op type: ALLREDUCEvs BARRIER",
        ["mismatch 1: all_reduce 31 [(10, 2)] | 0: barrier 31"],
    ),
    "sequence numbers": (
        "RuntimeError: Detected mismatch between collectives on ranks. Rank 3 is running collective: "
        f"CollectiveFingerPrint(SequenceNumber=4, OpType=ALLREDUCE, TensorShape=[2], {TENSORS}), but Rank 0 is running "
        f"collective: CollectiveFingerPrint(SequenceNumber=5, OpType=REDUCE, TensorShape=[2], {TENSORS}).Collectives differ "
        "in the following aspects: \t Sequence number: 4vs 5",
        ["mismatch 3: all_reduce 4 [(2,)] | 0: reduce 5"],
    ),
    "torch 1.12": (
        f"RuntimeError: Rank 0 is running inconsistent collective: CollectiveFingerPrint(OpType=BROADCAST, TensorShape=[10], {TENSORS})",
        ["mismatch 0: broadcast None [(10,)] | ?"],
    ),
    "monitored_barrier, one": (
        "[E ProcessGroupGloo.cpp:138] [Rank 0]: Rank 4 failed to pass monitoredBarrier in 30000 ms", ["note barrier 4"],
    ),
    "monitored_barrier, all": (
        f"[{GLOG}] [Rank 0]: Ranks 4, 5, 6, 7 failed to pass monitoredBarrier in 30000 ms", ["note barrier 4, 5, 6, 7"],
    ),
    "monitored_barrier, the exception": (
        "[rank0]: RuntimeError: Rank 4 failed to pass monitoredBarrier in 1800000 ms", ["note barrier 4"],
    ),
    "monitored_barrier, of others": (
        "[E ProcessGroupGloo.cpp:138] Rank 3 successfully reached monitoredBarrier, but received errors while waiting for "
        "send/recv from rank 0. Please check rank 0 logs for faulty rank.",
        ["note barrier"],
    ),
}  # fmt: skip

GLOO = {
    "closed, torch 2.13": (
        "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:41822. "
        "This is typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an "
        "error. GLHF! 🏖️",
        ["left", "consequence"],
    ),
    "reset": (
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:598] Read error [10.0.0.1]:41822: Connection reset by peer",
        ["left", "consequence"],
    ),
    "inside another error": (
        "RuntimeError: Worker failed with error '[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed "
        "by peer [10.0.0.52]:39075', please check the stack trace above for the root cause",
        ["left", "consequence"],
    ),
    "time-out": (
        "RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting "
        "1800000ms for recv operation to complete",
        ["timeout"],
    ),
    "pair closure": ("RuntimeError: Application timeout caused pair closure", ["left", "consequence"]),
    "refused": (
        "RuntimeError: Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/transport/tcp/socket.cc:1] timed out "
        "connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:4455",
        ["start"],
    ),
    "no interface": (
        "RuntimeError: [enforce fail at ../third_party/gloo/gloo/transport/tcp/device.cc:83] ifa != nullptr. Unable to find "
        "address for: eth9",
        ["start"],
    ),
    "incomplete": (
        "[Gloo] Rank 0 is connected to 7 peer ranks. Expected number of connected peer ranks is : 15", ["note incomplete 7/15"],
    ),
    "complete": ("[Gloo] Rank 0 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7", []),
}  # fmt: skip

ENDS = {
    "device memory": ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", ["memory"]),
    "memory, by NCCL": ("Cuda failure 2 'out of memory'", ["memory"]),
    "device": ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", ["device"]),
    "exception": ("KeyError: 'model.layers.0'", ["exception"]),
    "an engine's own end": ("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.", ["consequence"]),
    "a launcher that ends the others": ("Unable to shutdown process 12 via SIGTERM, forcefully exiting via SIGKILL", []),
    "Ray names three causes": (
        "A worker died or was killed while executing a task by an unexpected system error. Worker PID: 42 Worker exit type: "
        "SYSTEM_ERROR Worker exit detail: (1) The process is killed by SIGKILL by OOM killer (2) ray stop --force is called. "
        "(3) The worker is crashed unexpectedly due to SIGSEGV or other unexpected errors.",
        ["ended 42"],
    ),
    "vLLM's worker": (
        "(APIServer pid=2) ERROR 07-13 10:41:50 [c.py:602] Worker proc VllmWorker-3 died unexpectedly, shutting down", ["ended 3"],
    ),
    "an exception that vLLM caught": (
        "(MainProcess pid=2) WARNING 11-28 23:35:13 [base.py:380] ValueError: Tokenizer not available when `skip` is set", [],
    ),
    "torchrun, killed": (
        "  rank      : 7 (local_rank: 7)\n  exitcode  : -9 (pid: 4242)\n", ["note torchrun 7", "note process", "killed 7"],
    ),
    "torchrun, a watchdog's abort": (
        "  rank      : 7 (local_rank: 7)\n  exitcode  : -6 (pid: 4242)\n", ["note torchrun 7", "note process"],
    ),
    "MPI": ("MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD with errorcode 137.", ["consequence"]),
    "Xid of the hardware": (
        "[ 12.5] NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", ["device"],
    ),
    "Xid with a process": ("[ 1.5] NVRM: Xid (PCI:0000:5d:00): 31, pid='1234', name=python3, MMU Fault", ["device 1234"]),
    "a cgroup's limit": (
        "[ 9.1] Memory cgroup out of memory: Killed process 4242 (python) total-vm:1kB, anon-rss:2kB", ["killed 4242"],
    ),
    "the constraint": ("[ 9.1] oom-kill:constraint=CONSTRAINT_MEMCG,task=python,pid=4242,uid=0", ["killed 4242"]),
}  # fmt: skip

ENGINES = {
    "vLLM's heartbeat": (
        "(EngineCore pid=7) INFO 02-11 09:17:19 [s.py:802] No available shared memory broadcast block found in 60 seconds.",
        ["note heartbeat 60"],
    ),
    "vLLM's time-out": (
        "(EngineCore_DP0 pid=7) ERROR 10-22 09:43:49 [core.py:466] TimeoutError: RPC call to sample_tokens timed out.",
        ["consequence 0", "note process", "timeout 0"],
    ),
    "SGLang's watchdog": (
        "[2026-08-04 11:58:42 DP1 TP4 EP4] Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)",
        ["note watchdog 300"],
    ),
    "SGLang's other watchdogs": (
        "[2026-08-04 11:58:42] DetokenizerManager watchdog timeout (self.watchdog_timeout=300, self.soft=True)",
        ["note watchdog 300"],
    ),
    "SGLang ends": ("[2026-08-04 11:58:42] SIGQUIT received. signum=None, frame=None.", ["consequence"]),
    "TensorRT-LLM": ("Hang detected on rank 1 in PyExecutor.", ["note watchdog 1"]),
    "DeepEP, late": ("DeepEP timeout check failed: rank = 6, thread = 5, value = 1024)", ["note deepep 5"]),
    "DeepEP, there": ("DeepEP timeout check failed: rank = 6, thread = 5, value = 0)", ["note deepep"]),
    "DeepEP, internode": ("DeepEP dispatch NVL receiver timeout, channel: 3, RDMA: 1, nvl: 4, src RDMA: 0", ["note deepep"]),
}  # fmt: skip


@pytest.mark.parametrize("table", [DETAIL, GLOO, ENDS, ENGINES], ids=["detail", "gloo", "ends", "engines"])
def test_each_wording_gives_what_it_supports(table):
    assert {name: records(line) for name, (line, _) in table.items()} == {
        name: rows for name, (_, rows) in table.items()
    }


def test_a_rank_of_an_nvlink_domain_is_no_global_rank():
    (note,) = _records(io.BytesIO(b"DeepEP timeout check failed: rank = 6, thread = 5, value = 9)\n"), "job.log")
    assert note.process.rank is None


def test_an_unpadded_month_is_read_right():
    june = prefix.time_of("[rank0]:[E604 03:20:01.264313340 X.cpp:1] ")
    december = prefix.time_of("[rank0]:[E1206 03:20:01.26 X.cpp:1] ")
    march = prefix.time_of("[rank0]:[E321 03:20:01.26 X.cpp:1] ")
    assert march < june < december
    assert prefix.time_of("[rank0]:[E1399 03:20:01.26 X.cpp:1] ") is None


def test_the_start_of_a_wait_is_its_end_less_its_time():
    timed_out, progress = _records(io.BytesIO(watchdog(3, 9, "ALLREDUCE", queued=12).encode()), "rank_3.log")
    assert timed_out.at_s - timed_out.since_s == pytest.approx(600.021)
    assert isinstance(progress, Progress) and (progress.enqueued, progress.completed) == (12, 8)


def test_the_message_that_began_a_hang_and_the_last_one_are_kept_of_a_long_log(monkeypatch):
    monkeypatch.setattr("repro.ingest.logs.log.KEPT_RECORDS", 3)
    lines = "\n".join(f"KeyError: '{number}'" for number in range(50))
    texts = [record.text for record in _records(io.BytesIO((lines + "\n").encode()), "job.log")]
    assert [text.split("'")[1] for text in texts] == ["0", "1", "2", "47", "48", "49"]
