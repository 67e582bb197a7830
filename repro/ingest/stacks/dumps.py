"""Read stacks into `Stack`: text or JSON of py-spy, pystack, faulthandler, gdb, and stacks in logs of vLLM and SGLang.

A stack shows a place in the code, but no group, no sequence number and no iteration. py-spy's words "idle" and "active"
do not show whether a thread waits for other ranks: a thread that waits for a compiler is also "idle".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hybrid_moe_ref.files import DamagedFile, parse_json
from repro.ingest.logs.prefix import split_writer, writer_of
from repro.ingest.names.processes import process_of
from repro.ingest.stacks.activities import activity_of
from repro.ingest.stacks.frame_locals import group_of, peer_of
from repro.trace.foreign.records import Note, Process, Source, Stack

MAX_FRAMES = 400
MAX_STACKS = 100_000

_PROCESS = re.compile(r"^Process (\d{1,12}): (.*)$")
_SGLANG_DUMP = re.compile(r"Pyspy dump for PID (\d{1,12})")
_FAILED = re.compile(
    r"^(?:Error: )?(?:Failed to copy \w+ symbol|Failed to (?:find python version|suspend|open process|get \w+)|"
    r"Permission denied \(os error 13\)|No such process|Operation not permitted|ptrace: )"
)
_LOCK_FILE = re.compile(
    r"(?:lock_file|_lock_file|path|lock_path|filename):? ?=?:? ?['\"]?([^'\"\s]+\.lock|[^'\"\s]*lock[^'\"\s]*)['\"]?"
)
MARKS = ("Thread ", "thread ", "Process ", "Pyspy dump")

# For each tool: how a stack begins; whether the outermost frame is printed first; whether the thread's name is the one
# that Python has for it.
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
_FAULT_FRAME = re.compile(r'^ {2}File "(.*)", line (\d{1,9}|\?\?\?) in (.*)$')
_TRACEBACK_FRAME = re.compile(r'^ {2,6}(?:\((?:Python|C)\) )?File "(.*)", line (\d{1,9}), in (.*)$')
_LIBRARY = re.compile(r" \((\S{1,300}\.so[\w.]*)\)$")
_GDB_FRAME = re.compile(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(\S.*?) \(")
_GDB_PLACE = re.compile(r" (?:at|from) ([^\s()]+?)(?::\d+)?\s*$")
MAX_FRAME = 600
"""The largest number of characters of a line that is read as a frame. No tool writes a longer frame."""


@dataclass(slots=True)
class _Open:
    """A stack whose lines are still being read.

    named_by_python   whether ``name`` is Python's name for the thread, not the operating system's
    outermost_first   whether the tool prints the outermost frame first
    lock              path of a lock file in a local variable; "" if there is none
    """

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
                name = "MainThread"  # the system's name for this thread is the beginning of the process title
            yield _stack(self.process, frames, name, self.source, self.lock)


def looks_like_json(content: Any) -> bool:
    rows = content if isinstance(content, list) else []
    return bool(rows) and isinstance(rows[0], dict) and "frames" in rows[0] and "thread_name" in rows[0]


def read_json(content: Any, file: str) -> Iterator[Stack]:
    """Read the output of `py-spy dump --json`, a list of threads.

    With --subprocesses, each thread also has the title of its process, which can contain the rank.

    content: the list; file: the name of the file, which can contain the rank, too
    """
    for thread in content[:MAX_STACKS]:
        rows = thread.get("frames") if isinstance(thread, dict) else None
        if not isinstance(rows, list):
            continue
        rows = [frame for frame in rows[:MAX_FRAMES] if isinstance(frame, dict)]
        about = thread.get("process_info")
        title = str(about.get("command_line", "")) if isinstance(about, dict) else ""
        pid = thread.get("pid")
        process = process_of(title=title, file=file, pid=pid if isinstance(pid, int) else None)
        stack = _stack(process, frames_of(rows), str(thread.get("thread_name")), Source(file), _json_lock(rows))
        if stack.activity == "collective":
            group, others = group_of(rows)
            stack = replace(stack, group=group, other_groups=others, peer=peer_of(rows, group))
        yield stack


def frames_of(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return "function (file:line)" for each frame in the JSON of py-spy."""
    return tuple(map(_json_frame, rows))


def _json_frame(frame: Mapping[str, Any]) -> str:
    file = frame.get("short_filename") or frame.get("filename", "?")
    return f"{frame.get('name', '?')} ({file}:{frame.get('line', 0)})"[:MAX_FRAME]


def _json_lock(frames: Sequence[Mapping[str, Any]]) -> str:
    """Return the path of a lock file that is in a local variable (with py-spy --locals); "" if there is none."""
    for frame in frames:
        local_variables = frame.get("locals")
        for row in local_variables if isinstance(local_variables, list) else ():
            if isinstance(row, dict) and (
                match := _LOCK_FILE.search(f"{row.get('name')}: {row.get('repr')}"[:MAX_FRAME])
            ):
                return match[1]
    return ""


class Stacks:
    """Collects the stacks in a text, line by line, and skips all other lines.

    A stack ends before an empty line. It also ends before a line that is not indented, unless the line begins with "#"
    (gdb) or with the name of the process that wrote the line. `open` is true within a stack.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._process = process_of(file=file)
        self._current: _Open | None = None

    @property
    def open(self) -> bool:
        return self._current is not None

    def read(self, number: int, raw: str) -> Iterator[Stack | Note]:
        if self._current is None and not any(mark in raw for mark in MARKS):
            if number <= 3 and (match := _FAILED.search(raw)):
                source = Source(self._file, f"line {number}")
                yield Note("unreadable", f"no stack: {match[0]}", self._process, "", None, source)
            return
        line, writer = split_writer(raw)
        if named := _PROCESS.match(line) or _SGLANG_DUMP.search(line):
            title = named[2] if named.re is _PROCESS else ""
            self._process = process_of(title=title, file=self._file, pid=int(named[1]), line=line)
        start = _start_of(line)
        if named or start or not line.strip() or (line[0] not in " #" and not writer):
            yield from self.finish()
        if start is not None:
            match, outermost_first, named_by_python = start
            owner = self._process
            if owner.pid is None:  # no header names the process: use the prefix of the line, or else the file name
                owner = writer_of(raw[:240], owner)
            name = "MainThread" if match.groupdict().get("number") == "1" else match["name"] or ""
            source = Source(self._file, f"line {number}")
            self._current = _Open(owner, name, named_by_python, outermost_first, source)
        elif (current := self._current) is not None and len(current.frames) < MAX_FRAMES:
            if frame := _frame(line, bare=current.named_by_python):
                current.frames.append(frame)
            elif not current.lock and (match := _LOCK_FILE.search(line[:MAX_FRAME])):
                current.lock = match[1]

    def finish(self) -> Iterator[Stack]:
        if self._current is not None:
            yield from self._current.finished()
        self._current = None


def _start_of(line: str) -> tuple[re.Match[str], bool, bool] | None:
    for pattern, outermost_first, named_by_python in _STARTS:
        if match := pattern.search(line):
            return match, outermost_first, named_by_python
    return None


def _frame(line: str, *, bare: bool) -> str:
    """Return the frame in a line of any of the formats as "function (file:line)"; "" if the line is not a frame.

    bare: whether a line with only a function's name is a frame, as in the output of py-spy. In other formats, such a
    line is output of the program itself.
    """
    line = line[:MAX_FRAME].rstrip()
    if match := _FAULT_FRAME.match(line):
        return f"{match[3]} ({_short(match[1])}:{match[2]})"
    if match := _TRACEBACK_FRAME.match(line):
        if library := _LIBRARY.search(match[3]):
            return f"{match[3][: library.start()]} ({library[1]})"
        return f"{match[3]} ({_short(match[1])}:{match[2]})"
    if match := _GDB_FRAME.match(line):
        place = _GDB_PLACE.search(line)
        return f"{match[1]} ({_short(place[1] if place else '?')})"
    if line.startswith("    ") and not line.startswith("     "):
        return _pyspy_frame(line[4:], bare)
    return ""


def _pyspy_frame(text: str, bare: bool) -> str:
    """Return the frame in a line of py-spy, "function (file:line)"; "" if the line is not a frame.

    bare: whether a line with only a function's name is a frame, see `_frame`

    The names of native functions and of files can contain brackets, so only the last pair of brackets counts.
    """
    depth = 0
    for place in range(len(text) - 1, -1, -1) if text.endswith(")") else ():
        depth += {")": 1, "(": -1}.get(text[place], 0)
        if depth == 0:
            if text[max(place - 1, 0)] == " " and place > 1:
                return text
            break
    return text if bare and text not in ("Arguments:", "Locals:") else ""


def _runs_the_program(frames: Sequence[str]) -> bool:
    """Whether a stack belongs to the main thread, or to the thread in which TensorRT-LLM runs its main loop.

    The stack of a main thread has Python frames, and its outermost frames are not in `threading`.
    """
    if any("pyexecutor/py_executor.py" in frame and "_loop" in frame for frame in frames):
        return True
    return any(".py:" in frame for frame in frames) and not any("threading.py" in frame for frame in frames[-3:])


def _short(path: str) -> str:
    """Remove the folder of installed packages from a path: ".../site-packages/torch/nn/x.py" -> "torch/nn/x.py"."""
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
    """Return the content of a JSON file; None if the bytes are not JSON."""
    try:
        return parse_json(data, "")
    except DamagedFile:
        return None
