"""What serving engines print of a hang: vLLM, SGLang, TensorRT-LLM, Ray. Most of it is a heartbeat, and no error."""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.prefix import Line
from repro.trace.observed import Failure, Note, Observation, Source

NEEDLES = (
    "shared memory broadcast block", "world_size=", "world size",
    "torch.compile", "Scheduler watchdog timeout", "Hang detected",
    "RPC call to", "NCCL version", "nranks", "repeated", "tensor_parallel_size", "Capturing", "profile run",
    "Waiting for", "nvcc", "ninja", "Compiling", "compiling", "Autotun",
)  # fmt: skip

_HEARTBEAT = re.compile(r"No available shared memory broadcast block found in (\d+) seconds")
_WORLD = re.compile(r"world_size=(\d+) rank=(\d+)|rank (\d+) in world size (\d+)|nranks (\d+)")
_NCCL_VERSION = re.compile(r"NCCL version (\d+\.\d+\.\d+)")
_RPC = re.compile(r"RPC call to (\w+) timed out")
_WATCHDOG = re.compile(r"(\w*[Ww]atchdog) timeout \(self\.watchdog_timeout=(\d+)(?:, self\.soft=(\w+))?\)")
_HANG = re.compile(r"Hang detected (?:after (\d+) seconds|on rank (\d+) in (\w+))")
_COMPILED = re.compile(r"torch\.compile tak(?:es|ing) ([\d.]+) s|Compiling a graph|Dynamo bytecode transform time")
_REPEATED = re.compile(r"\[repeated (\d+)x across cluster\]")


def read(line: Line, source: Source) -> Iterator[Observation]:
    text, process, at_s = line.text, line.process, line.at_s
    if match := _HEARTBEAT.search(text):
        yield Note("heartbeat", f"vLLM's queue has waited for another {match[1]} s", process, match[1], at_s, source)
    elif match := _RPC.search(text):
        yield Failure(process, "timeout", f"vLLM gave up its wait for {match[1]}", at_s, source)
    elif match := _WATCHDOG.search(text):
        yield Note("watchdog", f"SGLang's {match[1]} fired after {match[2]} s", process, match[2], at_s, source)
    elif match := _HANG.search(text):
        where = f" on rank {match[2]} in {match[3]}" if match[2] else f" after {match[1]} s"
        yield Note("watchdog", f"TensorRT-LLM's watchdog fired{where}", process, match[2] or "", at_s, source)
    elif _COMPILED.search(text):
        yield Note("compiled", "a compile line, which the engine prints on one rank only", process, "", at_s, source)
    if match := _NCCL_VERSION.search(text):
        yield Note("version", f"NCCL {match[1]}", process, match[1], at_s, source)
    if match := _WORLD.search(text):
        size = match[1] or match[4] or match[5]
        yield Note("world", f"world size {size}", process, size, at_s, source)
    if match := _REPEATED.search(text):
        yield Note("repeated", f"Ray left out {match[1]} lines like this one", process, match[1], at_s, source)
