"""Stacks as text or JSON (py-spy, pystack, faulthandler, gdb, vLLM's and SGLang's dumps in their logs) to `Stack`.

A stack shows a place, never a number: which group, which sequence number and which iteration a thread is in stands in
no stack. "idle" and "active" as py-spy prints them say nothing of waiting: who waits for a compiler is idle too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_moe_ref.files import DamagedFile, parse_json
from repro.ingest.activities import activity_of
from repro.ingest.prefix import split_writer, writer_of
from repro.ingest.processes import process_of
from repro.trace.observed import Note, Process, Source, Stack

MAX_FRAMES = 400
MAX_STACKS = 100_000

_PROCESS = re.compile(r"^Process (\d+): (.*)$")
_SGLANG_DUMP = re.compile(r"Pyspy dump for PID (\d+)")
_FAILED = re.compile(
    r"^(?:Error: )?(?:Failed to copy \w+ symbol|Failed to (?:find python version|suspend|open process|get \w+)|"
    r"Permission denied \(os error 13\)|No such process|Operation not permitted|ptrace: )"
)
_LOCK_FILE = re.compile(
    r"(?:lock_file|_lock_file|path|lock_path|filename):? ?=?:? ?['\"]?([^'\"\s]+\.lock|[^'\"\s]*lock[^'\"\s]*)['\"]?"
)
_MARKS = ("Thread ", "thread ", "Process ", "Pyspy dump")

# How each tool begins a stack; whether its frames come outermost first; whether the name is one that Python gave.
_STARTS = (
    (re.compile(r'^Thread (?:0x)?[0-9a-fA-F]+ \((?:idle|active|active\+gil|idle\+gil)\)(?:: "(?P<name>.*)")?\s*$'),
     False, True),  # py-spy
    (re.compile(r"^(?:Current thread|Thread) 0x[0-9a-fA-F]+(?: \[(?P<name>.*)\])? \(most recent call first\):"),
     False, False),  # faulthandler
    (re.compile(r'^Thread (?P<number>\d+) \((?:Thread 0x[0-9a-f]+ )?\(?LWP \d+\)?\)?(?: "(?P<name>.*)")?'),
     False, False),  # gdb
    (re.compile(r"^Traceback for thread \d+(?: \((?P<name>.*?)\))?.*\(most recent call last\):"),
     True, False),  # pystack
    (re.compile(r"Thread \d+(?: \((?P<name>[^)]*)\))? stack trace:"), True, False),  # TensorRT-LLM
)  # fmt: skip
_PYSPY_FRAME = re.compile(r"^ {4}(\S.*) \(([^()]*?(?:\([^()]*\))?[^()]*)\)\s*$")
_PYSPY_BARE = re.compile(r"^ {4}(\S.*?)\s*$")
_FAULT_FRAME = re.compile(r'^ {2}File "(.*)", line (\d+|\?\?\?) in (.*)$')
_GDB_FRAME = re.compile(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(.+?) \(.*?\)(?: (?:at|from) (\S+?)(?::\d+)?)?\s*$")
_TRACEBACK_FRAME = re.compile(
    r'^ {2,6}(?:\((?:Python|C)\) )?File "(.*)", line (\d+), in (.*?)(?: \((\S*/?\S+\.so\S*)\))?$'
)


@dataclass(slots=True)
class _Open:
    """A stack while its lines are read."""

    process: Process
    name: str
    named_by_python: bool
    outermost_first: bool
    source: Source
    frames: list[str] = field(default_factory=list)
    lock: str = ""

    def finished(self) -> Iterator[Stack]:
        if self.frames:
            frames = tuple(reversed(self.frames)) if self.outermost_first else tuple(self.frames)
            name = self.name
            if not self.named_by_python and _runs_the_program(frames):
                name = "MainThread"  # the name that the system shows is the title of the process, cut short
            yield _stack(self.process, frames, name, self.source, self.lock)


def looks_like_json(content: Any) -> bool:
    rows = content if isinstance(content, list) else []
    return bool(rows) and isinstance(rows[0], dict) and "frames" in rows[0] and "thread_name" in rows[0]


def read_json(content: Any, file: str) -> Iterator[Stack]:
    """`py-spy dump --json`: a list of threads. The title of the process is there with --subprocesses only."""
    for thread in content[:MAX_STACKS]:
        rows = thread.get("frames") if isinstance(thread, dict) else None
        if not isinstance(rows, list):
            continue
        rows = [frame for frame in rows[:MAX_FRAMES] if isinstance(frame, dict)]
        about = thread.get("process_info")
        title = str(about.get("command_line", "")) if isinstance(about, dict) else ""
        pid = thread.get("pid")
        process = process_of(title=title, file=file, pid=pid if isinstance(pid, int) else None)
        yield _stack(
            process, tuple(map(_json_frame, rows)), str(thread.get("thread_name")), Source(file), _json_lock(rows)
        )


def _json_frame(frame: Mapping[str, Any]) -> str:
    file = frame.get("short_filename") or frame.get("filename", "?")
    return f"{frame.get('name', '?')} ({file}:{frame.get('line', 0)})"


def _json_lock(frames: Sequence[Mapping[str, Any]]) -> str:
    """The path of a lock file among the local variables (--locals)."""
    for frame in frames:
        local_variables = frame.get("locals")
        for row in local_variables if isinstance(local_variables, list) else ():
            if isinstance(row, dict) and (match := _LOCK_FILE.search(f"{row.get('name')}: {row.get('repr')}")):
                return match[1]
    return ""


def read(lines: Iterable[tuple[int, str]], file: str) -> Iterator[Stack | Note]:
    """All stacks in numbered lines of text; what is no stack is passed over.

    A stack ends with an empty line, or with one that stands at the margin.
    """
    process = process_of(file=file)
    current: _Open | None = None
    for number, raw in lines:
        if current is None and not any(mark in raw for mark in _MARKS):
            if number <= 3 and (match := _FAILED.search(raw)):
                yield Note("unreadable", f"no stack: {match[0]}", process, "", None, Source(file, f"line {number}"))
            continue
        line, writer = split_writer(raw)
        if named := _PROCESS.match(line) or _SGLANG_DUMP.search(line):
            title = named[2] if named.re is _PROCESS else ""
            process = process_of(title=title, file=file, pid=int(named[1]), line=line)
        start = _start_of(line)
        if named or start or not line.strip() or (line[0] not in " #" and not writer):
            if current is not None:
                yield from current.finished()
            current = None
        if start is not None:
            match, outermost_first, named_by_python = start
            owner = process
            if process.pid is None:  # no header named the process: the line's writer, then the file's name
                owner = writer_of(raw[:240], process)
            name = "MainThread" if match.groupdict().get("number") == "1" else match["name"] or ""
            current = _Open(owner, name, named_by_python, outermost_first, Source(file, f"line {number}"))
        elif current is not None and len(current.frames) < MAX_FRAMES:
            if frame := _frame(line, bare=current.named_by_python):
                current.frames.append(frame)
            elif not current.lock and (match := _LOCK_FILE.search(line)):
                current.lock = match[1]
    if current is not None:
        yield from current.finished()


def _start_of(line: str) -> tuple[re.Match[str], bool, bool] | None:
    for pattern, outermost_first, named_by_python in _STARTS:
        if match := pattern.search(line):
            return match, outermost_first, named_by_python
    return None


def _frame(line: str, *, bare: bool) -> str:
    """ "function (file:line)" of any of the formats, "" for a line that is no frame.

    bare: the tool prints functions without a file too; in other formats such a line is one of the program
    """
    if match := _FAULT_FRAME.match(line):
        return f"{match[3]} ({_short(match[1])}:{match[2]})"
    if match := _TRACEBACK_FRAME.match(line):
        return f"{match[3]} ({_short(match[4])})" if match[4] else f"{match[3]} ({_short(match[1])}:{match[2]})"
    if match := _GDB_FRAME.match(line):
        return f"{match[1]} ({_short(match[2] or '?')})"
    if line.startswith("    ") and not line.startswith("     "):
        if match := _PYSPY_FRAME.match(line):
            return f"{match[1]} ({match[2]})"
        alone = _PYSPY_BARE.match(line) if bare else None
        return alone[1] if alone and alone[1] not in ("Arguments:", "Locals:") else ""
    return ""


def _runs_the_program(frames: Sequence[str]) -> bool:
    """Whether a stack is of the thread that the program began in: it has Python frames, and no thread's start below.

    TensorRT-LLM's loop runs in a thread of its own.
    """
    if any("pyexecutor/py_executor.py" in frame and "_loop" in frame for frame in frames):
        return True
    return any(".py:" in frame for frame in frames) and not any("threading.py" in frame for frame in frames[-3:])


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


def as_json(data: bytes) -> Any:
    """The content of a JSON file, None where it is none."""
    try:
        return parse_json(data, "")
    except DamagedFile:
        return None
