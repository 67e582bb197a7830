"""Errors that end a process, by the text that programs print: out of memory, device errors, exceptions, kills, Xid, and
those that follow another rank's end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.prefix import Line
from repro.trace.observed import Failure, Left, Note, Observation, Process, Source

NEEDLES = (
    "Error", "error", "Exception", "out of memory",
    "OutOfMemory", "Killed process", "Xid", "illegal memory", "died unexpectedly",
    "Segmentation fault", "SIGKILL", "SIGSEGV",
    "Traceback", "Connection closed by localRank", "DeepEP", "unspecified launch",
    "KeyboardInterrupt", "SIGQUIT", "assert",
)  # fmt: skip

HARDWARE_XIDS = {48, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140}
SOFTWARE_XIDS = {13, 31, 43, 45, 69}

_MEMORY = re.compile(
    r"(?:torch\.)?(?:cuda\.)?OutOfMemoryError|CUDA out of memory|HIP out of memory|CUDA "
    r"error: out of memory|std::bad_alloc|MemoryError\b|Cannot allocate memory"
)
_DEVICE = re.compile(
    r"CUDA error: (?!out of memory)(.{4,80}?)(?:$|\.|\n)|(an illegal memory access was "
    r"encountered|device-side assert triggered|unspecified launch failure|uncorrectable ECC "
    r"error[^.]*|misaligned address|CUDA_ERROR_\w+|HIP error: .{4,60})"
)
_KILLED = re.compile(
    r"(?:Memory cgroup out of memory|Out of memory): Killed process (\d+) "
    r"\(([^)]*)\)|oom-kill:|Killed process (\d+) \(([^)]*)\)"
)
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)(?:, pid='?(\d+|<unknown>)'?)?(.*)")
_SIGNAL = re.compile(r"(?:Signal 9 \(SIGKILL\)|SIGKILL|Segmentation fault|SIGSEGV|Signal 11)")
_DIED = re.compile(r"(?:Worker proc|Engine core proc|proc) (\S+) died unexpectedly(?:.*exit code: (-?\d+))?")
_EXCEPTION = re.compile(r"(?:^|[\s\]:])((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)): ?(.*)$")
_BY_OTHERS = re.compile(
    r"EngineDeadError|EngineCore encountered|Engine core|ActorDiedError|Connection closed "
    r"by|Connection reset by peer|NCCL communicator was aborted|"
    r"remote process exited|RPC call to .* timed out|watchdog thread "
    r"terminated|DistBackendError|DistNetworkError|Broken pipe|ChildFailedError|"
    r"collective operation timeout|encountered an issue|Worker failed with error|Socket "
    r"Timeout|SignalException|WorkerProc hit an exception|"
    r"Failed core proc|monitoredBarrier|Detected mismatch between collectives|SIGQUIT "
    r"received|unhandled system error|recvValue failed|"
    r"ncclRemoteError|ncclInternalError|TCPStore|wait timeout after|cancelled|CancelledError|EngineCore failed to start"
)
_LOCAL_RANK = re.compile(r"\[Service thread\] Connection closed by localRank (\d+)")
_DEEPEP = re.compile(r"DeepEP timeout check failed: rank = (\d+), thread = (\d+), value = (-?\d+)")
_DEEPEP_OTHER = re.compile(r"DeepEP (?:dispatch|combine|timeout)[^\n]{0,160}")


def read(line: Line, source: Source) -> Iterator[Observation]:
    text, process = line.text, line.process
    if match := _DEEPEP.search(text):
        yield from _deepep(match, line, source)
        return
    if match := _LOCAL_RANK.search(text):
        yield Left(process, None, f"NCCL: connection closed by local rank {match[1]}", line.at_s, source)
        yield Note(
            "local rank", "NCCL's service thread saw it close its connection", process, match[1], line.at_s, source
        )
        return
    if match := _XID.search(text):
        code = int(match[2])
        kind = "hardware" if code in HARDWARE_XIDS else "software"
        pid = int(match[3]) if match[3] and match[3].isdigit() and match[3] != "0" else None
        yield Failure(
            Process(pid, f"GPU {match[1]}"),
            "device",
            f"Xid {code} ({kind}) on GPU {match[1]}{_tail(match[4])}",
            line.at_s,
            source,
        )
        return
    if match := _KILLED.search(text):
        killed = match[1] or match[3]
        if killed:
            yield Failure(
                Process(int(killed), match[2] or match[4] or ""),
                "killed",
                f"the kernel's OOM killer ended process {killed}",
                line.at_s,
                source,
            )
        return
    if match := _DIED.search(text):
        named = _process_named(match[1])
        kind = "killed" if match[2] == "-9" else "ended"
        yield Failure(
            named,
            kind,
            f"{match[1]} died unexpectedly" + (f" (exit code {match[2]})" if match[2] else ""),
            line.at_s,
            source,
        )
        return
    if _BY_OTHERS.search(text):
        if "Detected mismatch" not in text and "[rank" not in text[:0]:
            yield Failure(process, "consequence", _words(text), line.at_s, source)
        return
    if _MEMORY.search(text):
        yield Failure(process, "memory", "out of memory: " + _words(text), line.at_s, source)
    elif match := _DEVICE.search(text):
        yield Failure(process, "device", "CUDA: " + (match[1] or match[2]).strip(), line.at_s, source)
    elif _SIGNAL.search(text) and "SIGABRT" not in text:
        yield Failure(
            process, "killed" if "KILL" in text or "Signal 9" in text else "exception", _words(text), line.at_s, source
        )
    elif (match := _EXCEPTION.search(text)) and "Warning" not in match[1]:
        yield Failure(process, "exception", f"{match[1]}: {match[2]}"[:160], line.at_s, source)


def _deepep(match: re.Match[str], line: Line, source: Source) -> Iterator[Observation]:
    """Thread t of a rank polls peer t of its NVLink domain; a value above 0 says that this peer has not come."""
    rank, peer, value = int(match[1]), int(match[2]), int(match[3])
    late = f", peer {peer} had not come" if value > 0 else ""
    yield Note(
        "deepep",
        f"DeepEP barrier of rank {rank} ran into its time-out{late}",
        Process(rank=rank),
        str(peer) if value > 0 else "",
        line.at_s,
        source,
    )


def _process_named(title: str) -> Process:
    from repro.ingest.processes import rank_in, role_of

    return Process(None, title, rank_in(title), role_of(title))


def _tail(text: str | None) -> str:
    words = (text or "").strip(" ,.")
    words = re.sub(r"^(?:pid=\S+,?\s*)?(?:name=\S+,?\s*)?", "", words)
    return f": {words[:80]}" if words else ""


def _words(text: str) -> str:
    """The last part of a line, where the error stands."""
    match = _EXCEPTION.search(text)
    return (f"{match[1]}: {match[2]}" if match else text.strip())[:160]
