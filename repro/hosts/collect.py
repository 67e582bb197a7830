"""Collect stacks and Flight Recorder dumps from live ranks, and read the launcher's log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from repro.store.run_dir import RunDir, read_text
from repro.verdict.result import name_ranks

POLL_S = 0.01
PATIENCE_S = 0.7
"""Seconds that live ranks may take to write their files."""


def collect(run_dir: RunDir, pids: Mapping[int, int], patience_s: float) -> dict[int, str]:
    """Signal ranks to write their stacks and Flight Recorder dumps, and wait until all files are written.

    pids         the pid of each rank that runs. Each process must have called `signals.dump_on_signals`; otherwise the
                 signal would end the process
    patience_s   how many seconds to wait at most

    Returns, for each rank that did not write both files, the end of a sentence "rank 1 left no …": "stack", or
    "stack and no Flight Recorder dump". A suspended process (SIGSTOP) writes neither file.
    """
    requests: list[tuple[int, str, Path, int]] = []
    for rank, pid in pids.items():
        for path, what, number in (
            (run_dir.stack(rank), "stack", signal.SIGUSR1),
            (run_dir.flight_recorder(rank), "Flight Recorder dump", signal.SIGUSR2),
        ):
            requests.append((rank, what, path, _stamp(path)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    deadline = time.monotonic() + patience_s
    while any(_stamp(path) == before for _, _, path, before in requests) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    missing: dict[int, list[str]] = {}
    for rank, what, path, before in requests:
        if _stamp(path) == before:
            missing.setdefault(rank, []).append(what)
    return {rank: " and no ".join(files) for rank, files in missing.items()}


def name_missing(unanswered: Mapping[int, str], patience_s: float) -> list[str]:
    """Return a sentence for each set of ranks that lack the same evidence: "ranks 1,2 left no stack within 0.7 s".

    unanswered: the result of `collect`; patience_s: how many seconds `collect` waited
    """
    ranks: dict[str, list[int]] = {}
    for rank, what in sorted(unanswered.items()):
        ranks.setdefault(what, []).append(rank)
    return [f"{name_ranks(group)} left no {what} within {patience_s:g} s" for what, group in ranks.items()]


def of_launcher(run_dir: RunDir, ranks: Sequence[int]) -> str:
    """Return a sentence about ``ranks``, which never opened their witnesses. The sentence quotes the launcher's log.

    The quotation is the last error in the log, or the last line if the log has no error.
    """
    lines = [line.strip() for line in read_text(run_dir.launcher_log).splitlines() if re.search(r"\w", line)]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    last = (errors or lines or ["nothing"])[-1]
    return f"{name_ranks(ranks)} never began: logs/{run_dir.launcher_log.name} says {last[:300]}"


def _stamp(path: Path) -> int:
    """Return a number that changes when the file is written; 0 if the file is absent or empty."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_mtime_ns if status.st_size else 0


_ENDED_BY_SIGNAL = re.compile(r"Received (?:Signals\.)?(\w+) death signal|KeyboardInterrupt")


def launcher_was_ended(run_dir: RunDir) -> str:
    """Return a sentence about the signal after which torchrun ended its ranks; "" if torchrun's log shows no signal."""
    match = _ENDED_BY_SIGNAL.search(read_text(run_dir.launcher_log))
    if match is None:
        return ""
    name = match[1] or "SIGINT"
    name = signal.Signals(int(name)).name if name.isdigit() else name
    return f"the launcher received {name} and ended the ranks (logs/{run_dir.launcher_log.name})"
