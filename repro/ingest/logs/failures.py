"""Read error lines of processes that end: out of memory, device errors, exceptions, kills.

The text decides the kind of the error. Many errors have the kind "consequence": the process failed only because a
different rank had ended before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.logs.prefix import Line
from repro.ingest.names.processes import member_of
from repro.trace.foreign.records import Failure, Observation, Process, Source

NEEDLES = (
    "Error", "error", "Exception", "out of memory", "OutOfMemory", "illegal memory", "died unexpectedly",
    "Segmentation fault", "SIGKILL", "SIGSEGV", "ignal 9", "unspecified launch", "KeyboardInterrupt", "SIGQUIT",
    "device-side assert", "bad_alloc", "failure",
)  # fmt: skip

_MEMORY = re.compile(
    r"(?:torch\.)?(?:cuda\.)?OutOfMemoryError|CUDA out of memory|HIP out of memory|CUDA "
    r"error: out of memory|Cuda failure (?:\d+ )?'out of memory'|std::bad_alloc|MemoryError\b|Cannot allocate memory"
)
_DEVICE = re.compile(
    r"CUDA error: (?!out of memory)(.{4,80}?)(?:$|\.|\n)|(an illegal memory access was "
    r"encountered|device-side assert triggered|unspecified launch failure|uncorrectable ECC "
    r"error[^.]*|misaligned address|CUDA_ERROR_\w+|HIP error: .{4,60}|Cuda failure (?:\d+ )?'[^']{4,80}')"
)
_SIGNAL = re.compile(
    r"Signal 9 \(SIGKILL\) received(?: by PID (\d{1,12}))?|\b(?:killed|terminated|died|exited)\b.{0,40}"
    r"(?:SIGKILL|signal 9\b)|Segmentation fault|SIGSEGV|Signal 11"
)
_DIED = re.compile(r"(?:Worker proc|Engine core proc|proc) (\S+) died unexpectedly(?:.*exit code: (-?\d{1,12}))?")
_EXCEPTION = re.compile(r"(?:^|[\s\]:])((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)): ?(.*)$")
# vLLM printed the exception at a level below ERROR: it handled the exception and goes on
_HANDLED = re.compile(r"\b(?:DEBUG|INFO|WARNING) \d\d-\d\d \d\d:")
_BY_OTHERS = re.compile(
    r"EngineDeadError|EngineCore encountered|Engine core|ActorDiedError|Connection closed "
    r"by|Connection reset by peer|NCCL communicator was aborted|"
    r"remote process exited|RPC call to .* timed out|watchdog thread "
    r"terminated|DistBackendError|DistNetworkError|Broken pipe|ChildFailedError|"
    r"collective operation timeout|encountered an issue|Worker failed with error|Socket "
    r"Timeout|timed out in blocking wait|SignalException|WorkerProc hit an exception|"
    r"Failed core proc|monitoredBarrier|Detected mismatch between collectives|SIGQUIT "
    r"received|unhandled system error|recvValue failed|"
    r"ncclRemoteError|ncclInternalError|TCPStore|wait timeout after|cancelled|CancelledError|EngineCore failed to start"
)


def read(line: Line, source: Source) -> Iterator[Observation]:
    text, process = line.text, line.process

    def failure(kind: str, words: str, owner: Process = process) -> Failure:
        return Failure(owner, kind, words[:160], line.at_s, source)

    if match := _DIED.search(text):
        code = f" (exit code {match[2]})" if match[2] else ""
        named = member_of(process, match[1])
        yield failure("killed" if match[2] == "-9" else "ended", f"{named.title} died unexpectedly{code}", named)
    elif _BY_OTHERS.search(text):
        yield failure("consequence", _words(text))
    elif _MEMORY.search(text):
        yield failure("memory", "out of memory: " + _words(text))
    elif match := _DEVICE.search(text):
        yield failure("device", "CUDA: " + (match[1] or match[2]).strip())
    elif match := _SIGNAL.search(text):
        owner = Process(int(match[1])) if match[1] else process
        yield failure("exception" if "Segm" in text or "SEGV" in text else "killed", _words(text), owner)
    elif (match := _EXCEPTION.search(text)) and "Warning" not in match[1] and not _HANDLED.search(text[:240]):
        yield failure("exception", f"{match[1]}: {match[2]}")


def _words(text: str) -> str:
    """Return the message at the end of a line, "ValueError: …"; the whole line if it contains no such message."""
    match = _EXCEPTION.search(text)
    return f"{match[1]}: {match[2]}" if match else text.strip()
