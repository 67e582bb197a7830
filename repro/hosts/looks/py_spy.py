"""Take the Python stacks of running processes with py-spy, without suspending the processes.

py-spy reads the memory of a process. So py-spy must run as the same user, and must have the right to trace the process.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 4.0
AT_ONCE = 4
TRIES = 5
"""How many times py-spy is tried. It fails if the process changes its stack while py-spy reads it."""
_FINAL = ("rocess", "ermission", "no answer")
"""Words in the messages of failures that would happen again: no such process, no permission, no answer in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The threads of one process as `py-spy dump --json` prints them, or the reason why there are none."""

    threads: tuple[Mapping[str, Any], ...] = ()
    failure: str = ""


def find_py_spy() -> str:
    """Return the path of py-spy, from the PATH or from this Python's packages; "" if py-spy is not installed."""
    if path := shutil.which("py-spy"):
        return path
    try:
        files = importlib.metadata.files("py-spy") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    paths = [Path(str(file.locate())) for file in files if file.name == "py-spy"]
    return next((str(path.resolve()) for path in paths if path.is_file()), "")


def take_stacks(program: str, pids: Collection[int]) -> dict[int, Answer]:
    """Take the stacks of all threads of each process, with local variables. Returns py-spy's answer for each pid.

    program: the path of py-spy
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(pids, pool.map(lambda pid: _dump(program, pid), pids), strict=True))


def _dump(program: str, pid: int) -> Answer:
    answer = Answer(failure="not tried")
    for _ in range(TRIES):
        answer = _try_dump([program, "dump", "--nonblocking", "--locals", "--json", "--pid", str(pid)])
        if answer.threads or any(word in answer.failure for word in _FINAL):
            break
    return answer


def _try_dump(command: list[str]) -> Answer:
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Answer(failure=f"py-spy gave no answer within {PATIENCE_S:g} s")
    except OSError as error:
        return Answer(failure=f"py-spy cannot be started: {error.strerror}")
    if done.returncode != 0:
        return Answer(failure=_reason(done.stderr.decode(errors="replace")) or f"py-spy ended with {done.returncode}")
    try:
        threads = json.loads(done.stdout)
    except ValueError:
        return Answer(failure="py-spy printed no JSON")
    rows = [thread for thread in threads if isinstance(thread, dict)] if isinstance(threads, list) else []
    return Answer(tuple(rows), "" if rows else "py-spy found no thread")


def _reason(printed: str) -> str:
    """Return py-spy's error message without a backtrace."""
    lines = [line.removeprefix("Error:").strip() for line in printed.partition("Stack backtrace")[0].splitlines()]
    reason = "; ".join(dict.fromkeys(line for line in lines if line))[:200]
    hint = "; py-spy may be too old for this Python: pip install -U py-spy" if "ython version" in reason else ""
    return reason + hint
