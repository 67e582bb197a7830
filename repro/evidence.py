"""Ask live ranks for their stacks and Flight Recorder dumps, before anything is killed, and read the latter.

The Flight Recorder is PyTorch's own record of collectives, made by other code than ours, so where both say the
same about a rank the position is certain, and where they do not it is said.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from repro.rundir import RunDir, read_json, read_text
from repro.verdict.result import Position, name_ranks

POLL_S = 0.01
PATIENCE_S = 0.7
"""How long live ranks may take to leave their files."""


def collect(run_dir: RunDir, pids: Mapping[int, int], patience_s: float) -> list[str]:
    """Signal every live rank and wait until its files are there, at most ``patience_s``.

    pids: rank -> process id; each must have called ``worker.dump_on_signals``, or the signal would end it.

    Returns a sentence for each file that did not come; a stopped process, for one, cannot answer.
    """
    wanted: dict[Path, tuple[int, str, int]] = {}
    for rank, pid in pids.items():
        for path, what, number in (
            (run_dir.stack(rank), "stack", signal.SIGUSR1),
            (run_dir.flight_recorder(rank), "Flight Recorder dump", signal.SIGUSR2),
        ):
            wanted[path] = (rank, what, _stamp(path))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if all(_stamp(path) != before for path, (_, _, before) in wanted.items()):
            break
        time.sleep(POLL_S)
    return [
        f"rank {rank} left no {what} within {patience_s:g} s"
        for path, (rank, what, before) in wanted.items()
        if _stamp(path) == before
    ]


def of_launcher(run_dir: RunDir, ranks: Sequence[int]) -> str:
    """Why ranks never began, by the launcher's log: its last line that is an error, else its last line."""
    lines = [line.strip() for line in read_text(run_dir.launcher_log).splitlines() if re.search(r"\w", line)]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    last = (errors or lines or ["nothing"])[-1]
    return f"{name_ranks(ranks)} never began: logs/{run_dir.launcher_log.name} says {last[:300]}"


def compare_with_flight_recorder(run_dir: RunDir, positions: Iterable[Position]) -> list[str]:
    """One sentence for all blocked ranks whose dump agrees with their position, and one for each that does not."""
    agree: list[int] = []
    ahead: list[int] = []
    differ: list[str] = []
    for position in positions:
        if position.state != "blocked" or (pending := _pending(run_dir.flight_recorder(position.rank))) is None:
            continue
        if (position.group, position.seq) in pending:
            agree.append(position.rank)
        elif any(group == position.group and seq > position.seq for group, seq in pending):
            ahead.append(position.rank)
        else:
            told = ", ".join(f"{group} #{seq}" for group, seq in pending) or "nothing"
            differ.append(
                f"rank {position.rank}: the Flight Recorder has {told} pending, "
                f"the witness {position.group} #{position.seq}"
            )
    if agree:
        differ.insert(0, f"{name_ranks(agree)}: the Flight Recorder has the same collective pending")
    if ahead:
        differ.append(
            f"{name_ranks(ahead)}: the Flight Recorder has a collective of the same group pending, under a higher "
            "number: it counts each of those that one call is made of"
        )
    return differ


def _pending(dump: Path) -> list[tuple[str, int]] | None:
    """(group, sequence) of what was issued and not completed; None without a readable dump.

    On gloo an entry's ``state`` stays "scheduled" for ever; ``retired`` is what tells.
    """
    try:
        document = read_json(dump)
        return [
            (str(entry["process_group"][1]), int(entry["collective_seq_id"]))
            for entry in document["entries"]
            if not entry["retired"]
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _stamp(path: Path) -> int:
    """Changes when the file is written: 0 where there is none or nothing in it."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_mtime_ns if status.st_size else 0
