"""Read what serving engines (vLLM, SGLang, TensorRT-LLM, Ray) print during a hang.

Most of these lines are not errors: the engine prints them again and again while it waits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.logs.prefix import Line
from repro.trace.foreign.records import Failure, Note, Observation, Process, Source

NEEDLES = (
    "shared memory broadcast block", "world_size=", "world size", "group leader", "torch.compile", "Compiling a graph",
    "Dynamo bytecode", "atchdog timeout", "Hang detected", "RPC call to", "NCCL version",
)  # fmt: skip

MAX_PROCESSES = 4096

_HEARTBEAT = re.compile(r"No available shared memory broadcast block found in (\d{1,12}) seconds")
_WORLD = re.compile(r"world_size=(\d{1,12}) rank=(\d{1,12})|rank (\d{1,12}) in world size (\d{1,12})")
_ASSIGNED = re.compile(
    r"rank (\d{1,7}) in world size \d{1,7} is assigned as DP rank (\d{1,7}), PP rank (\d{1,7}), .*?\bTP rank (\d{1,7})"
)
_ENGINE_SIZE = re.compile(r"DP group leader: .*\bworld_size=(\d{1,7})")
_NCCL_VERSION = re.compile(r"NCCL version (\d+\.\d+\.\d+)")
_RPC = re.compile(r"RPC call to (\w+) timed out")
_WATCHDOG = re.compile(r"(\w{0,40} ?[Ww]atchdog) timeout \(self\.watchdog_timeout=(\d{1,12})(?:, self\.soft=(\w+))?\)")
_HANG = re.compile(r"Hang detected (?:after (\d{1,12}) seconds|on rank (\d{1,12}) in (\w+))")
_COMPILED = re.compile(r"torch\.compile tak(?:es|ing) ([\d.]+) s|Compiling a graph|Dynamo bytecode transform time")


class Engine:
    """Reads the lines of a serving engine in one file.

    The first lines of a process contain its rank and its pid, later lines contain only the pid. So the reader makes a
    record for each pid, which says which rank has this pid.
    """

    def __init__(self) -> None:
        self._named: set[tuple[int | None, int | None]] = set()

    def read(self, line: Line, source: Source) -> Iterator[Observation]:
        pid, rank = line.process.pid, line.process.rank
        if pid is not None and rank is not None and (pid, rank) not in self._named and len(self._named) < MAX_PROCESSES:
            self._named.add((pid, rank))
            yield Note("process", f"process {pid} is {line.process}", line.process, "", line.at_s, source)
        yield from _messages(line, source)

    def finish(self) -> Iterator[Observation]:
        return iter(())


def _messages(line: Line, source: Source) -> Iterator[Observation]:
    text, process, at_s = line.text, line.process, line.at_s
    if match := _HEARTBEAT.search(text):
        yield Note("heartbeat", f"vLLM's queue has waited for another {match[1]} s", process, match[1], at_s, source)
    elif match := _RPC.search(text):
        yield Failure(process, "timeout", f"vLLM gave up its wait for {match[1]}", at_s, source)
    elif "self.watchdog_timeout=" in text and (match := _WATCHDOG.search(text)):  # the search is slow on long words
        soft = ", as a warning that ends no process" if match[3] == "True" else ""
        yield Note("watchdog", f"SGLang's {match[1]} fired after {match[2]} s{soft}", process, match[2], at_s, source)
    elif match := _HANG.search(text):
        where = f" on rank {match[2]} in {match[3]}" if match[2] else f" after {match[1]} s"
        yield Note("watchdog", f"TensorRT-LLM's watchdog fired{where}", process, match[2] or "", at_s, source)
    elif _COMPILED.search(text):
        yield Note(
            "compiled", "a line about compilation, which the engine prints on one rank only", process, "", at_s, source
        )
    if match := _NCCL_VERSION.search(text):
        yield Note("version", f"NCCL {match[1]}", process, match[1], at_s, source)
    if match := _ASSIGNED.search(text):
        stage = f"_PP{match[3]}" if match[3] != "0" else ""
        named = Process(process.pid, f"Worker_DP{match[2]}{stage}_TP{match[4]}", int(match[1]), "worker")
        yield Note("process", f"process {process.pid} is {named}", named, "", at_s, source)
    elif match := _ENGINE_SIZE.search(text):
        yield Note("engine size", f"an engine of {match[1]} workers", process, match[1], at_s, source)
    if match := _WORLD.search(text):
        size = match[1] or match[4]
        yield Note("world", f"world size {size}", process, size, at_s, source)
