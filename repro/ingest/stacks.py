"""Stacks as text or JSON (py-spy, pystack, faulthandler, gdb, vLLM's and SGLang's dumps in their logs) to `Stack`.

A stack shows a place, never a number: which group, which sequence number and which iteration a thread is in stands in
no stack. "idle" and "active" as py-spy prints them say nothing of waiting: who waits for a compiler is idle too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from hybrid_moe_ref.files import DamagedFile, parse_json
from repro.ingest.activities import activity_of
from repro.ingest.processes import process_of
from repro.trace.observed import Process, Source, Stack

MAX_FRAMES = 400
MAX_STACKS = 100_000

_PROCESS = re.compile(r"^Process (\d+): (.*)$")
_PYSPY_THREAD = re.compile(r'^Thread (?:0x)?[0-9a-fA-F]+ \((?:idle|active|active\+gil|idle\+gil)\)(?:: "(.*)")?\s*$')
_PYSPY_FRAME = re.compile(r"^ {4}(\S.*) \(([^()]*?(?:\([^()]*\))?[^()]*)\)\s*$")
_PYSPY_BARE = re.compile(r"^ {4}(\S.*?)\s*$")
_FAULT_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-fA-F]+)(?: \[(.*)\])? \(most recent call first\):")
_FAULT_FRAME = re.compile(r'^ {2}File "(.*)", line (\d+|\?\?\?) in (.*)$')
_GDB_THREAD = re.compile(r'^Thread (\d+) \((?:Thread 0x[0-9a-f]+ )?\(?LWP (\d+)\)?\)?(?: "(.*)")?')
_GDB_FRAME = re.compile(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(.+?) \(.*?\)(?: (?:at|from) (\S+?)(?::\d+)?)?\s*$")
_PYSTACK_THREAD = re.compile(r"^Traceback for thread (\d+)(?: \((.*?)\))?.*\(most recent call last\):")
_ELASTIC_FRAME = re.compile(r'^ {2,6}(?:\(Python\) )?File "(.*)", line (\d+), in (.*)$')
_SGLANG_DUMP = re.compile(r"Pyspy dump for PID (\d+)")
_LOCK_FILE = re.compile(
    r"(?:lock_file|_lock_file|path|lock_path|filename):? ?=?:? ?['\"]?([^'\"\s]+\.lock|[^'\"\s]*lock[^'\"\s]*)['\"]?"
)


def looks_like(head: str) -> bool:
    return any(
        pattern.search(line)
        for line in head.splitlines()[:400]
        for pattern in (_PROCESS, _PYSPY_THREAD, _FAULT_THREAD, _GDB_THREAD, _PYSTACK_THREAD, _SGLANG_DUMP)
    )


def looks_like_json(content: Any) -> bool:
    rows = content if isinstance(content, list) else []
    return bool(rows) and isinstance(rows[0], dict) and "frames" in rows[0] and "thread_name" in rows[0]


def read_json(content: Any, file: str) -> list[Stack]:
    """`py-spy dump --json`: a list of threads, without the title of the process."""
    process = process_of(file=file)
    stacks = []
    for thread in content[:MAX_STACKS]:
        if not isinstance(thread, dict):
            continue
        frames = tuple(
            f"{frame.get('name', '?')} "
            f"({frame.get('short_filename') or frame.get('filename', '?')}:{frame.get('line', 0)})"
            for frame in (thread.get("frames") or [])[:MAX_FRAMES]
            if isinstance(frame, dict)
        )
        pid = thread.get("pid")
        owner = process_of(file=file, pid=pid) if isinstance(pid, int) else process
        stacks.append(_stack(owner, frames, str(thread.get("thread_name", "")), Source(file)))
    return stacks


def read(lines: Iterable[tuple[int, str]], file: str) -> Iterator[Stack]:
    """All stacks in numbered lines of text; what is no stack is passed over."""
    process = process_of(file=file)
    thread: str | None = None
    frames: list[str] = []
    begins, lock, outermost_first = 0, "", False

    def finished() -> Iterator[Stack]:
        if thread is not None and frames:
            ordered = tuple(reversed(frames)) if outermost_first else tuple(frames)
            yield _stack(process, ordered, thread, Source(file, f"line {begins}"), lock)

    for number, line in lines:
        start = _thread_start(line)
        named = _PROCESS.match(line) or _SGLANG_DUMP.search(line)
        if start is None and named is None:
            if thread is not None:
                frame = _frame(line)
                if frame and len(frames) < MAX_FRAMES:
                    frames.append(frame)
                elif lock_file := _LOCK_FILE.search(line):
                    lock = lock or lock_file.group(1)
            continue
        yield from finished()
        thread, frames, lock = None, [], ""
        if named is not None:
            title = named.group(2) if named.re is _PROCESS else ""
            process = process_of(title=title, file=file, pid=int(named.group(1)), line=line)
        if start is not None:
            thread, outermost_first = start
            begins = number
    yield from finished()


def _thread_start(line: str) -> tuple[str, bool] | None:
    """(name of the thread, whether its frames come outermost first) where a line begins a stack."""
    if match := _PYSPY_THREAD.match(line):
        return match.group(1) or "", False
    if match := _FAULT_THREAD.match(line):
        return match.group(2) or "", False
    if match := _GDB_THREAD.match(line):
        return match.group(3) or match.group(2), False
    if match := _PYSTACK_THREAD.match(line):
        return match.group(2) or match.group(1), True
    return None


def _frame(line: str) -> str:
    """ "function (file:line)" of any of the formats, "" for a line that is no frame."""
    if match := _FAULT_FRAME.match(line):
        return f"{match.group(3)} ({_short(match.group(1))}:{match.group(2)})"
    if match := _ELASTIC_FRAME.match(line):
        return f"{match.group(3)} ({_short(match.group(1))}:{match.group(2)})"
    if match := _GDB_FRAME.match(line):
        return f"{match.group(1)} ({_short(match.group(2) or '?')})"
    if line.startswith("    ") and not line.startswith("     "):
        if match := _PYSPY_FRAME.match(line):
            return f"{match.group(1)} ({match.group(2)})"
        bare = _PYSPY_BARE.match(line)
        return bare.group(1) if bare and bare.group(1) not in ("Arguments:", "Locals:") else ""
    return ""


def _short(path: str) -> str:
    """A path from its package on: ".../site-packages/torch/nn/x.py" -> "torch/nn/x.py"."""
    for mark in ("site-packages/", "dist-packages/"):
        if mark in path:
            return path.rpartition(mark)[2]
    return path


def _stack(process: Process, frames: tuple[str, ...], thread: str, source: Source, lock: str = "") -> Stack:
    activity, detail = activity_of(frames)
    if activity == "lock" and lock:
        detail = f"{detail}: {lock}"
    return Stack(process, frames, activity, detail, thread, 0, source)


def is_main(stack: Stack) -> bool:
    """Whether this is the thread that runs the program; a dump without thread names is taken by its frames."""
    if stack.thread:
        return stack.thread in ("MainThread", "main") or stack.thread.startswith("python")
    return not any("threading.py" in frame for frame in stack.frames[-3:])


def as_json(data: bytes) -> Any:
    """The content of a JSON file, None where it is none."""
    try:
        return parse_json(data, "")
    except DamagedFile:
        return None
