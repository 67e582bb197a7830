"""Start the jobs of hung_jobs.py, wait until they hang, and look at them with `collect`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.commands.cli import main
from repro.hosts.looks.proc import command_of, descendants, read_all, read_status

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "tests" / "support" / "jobs" / "hung_jobs.py"
NUM_RANKS = 3
PATIENCE_S = 60.0
STILL_LOOKS = 8
ALL_MOVE = ("healthy", "dead_peer")
"""Kinds of jobs whose ranks go on, or poll a store."""


@dataclass(frozen=True)
class HungJob:
    """One running job, and the folder into which its ranks write."""

    kind: str
    folder: Path
    parent: subprocess.Popen[bytes]

    @property
    def pids(self) -> list[int]:
        return [int((self.folder / f"rank{rank}.pid").read_text()) for rank in range(NUM_RANKS)]

    def wait_until_hung(self) -> None:
        """Return when two of three ranks have stopped or poll for a lock; for kinds in ALL_MOVE, after as many
        looks.
        """
        end_s = time.monotonic() + PATIENCE_S
        while len(list(self.folder.glob("rank*.started"))) < NUM_RANKS:
            assert self.parent.poll() is None and time.monotonic() < end_s, (
                f"{self.kind}: see {self.folder}/../jobs.log"
            )
            time.sleep(0.05)
        last: dict[int, int] = {}
        seen = 0
        while seen < STILL_LOOKS:
            assert time.monotonic() < end_s, f"{self.kind}: the ranks do not hang"
            time.sleep(0.15)
            rows = {pid: read_status(pid) for pid in self.pids}
            now = {pid: row.switches for pid, row in rows.items() if row}
            asleep = {pid for pid, row in rows.items() if row and row.state != "R"}
            still = sum(0 <= now[pid] - last.get(pid, -9) <= 3 for pid in asleep)
            seen = seen + 1 if still >= 2 or self.kind in ALL_MOVE else 0
            last = now


@contextlib.contextmanager
def hung_jobs(kinds: list[str], root: Path) -> Iterator[dict[str, HungJob]]:
    """Start jobs of these kinds together below one parent. All of them are killed at the end."""
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{binaries}:{os.environ.get('PATH', '')}"}
    with (root / "jobs.log").open("wb") as log:
        parent = subprocess.Popen(
            [sys.executable, str(PROGRAM), ",".join(kinds), str(root)], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        yield {kind: HungJob(kind, root / kind, parent) for kind in kinds}
    finally:
        kill_job([parent.pid], root)
        parent.wait()


def kill_job(pids: list[int], root: Path) -> None:
    """Kill processes with all their descendants, and make sure that none is left whose command names a file below
    `root`.

    They are stopped first: a rank that gets a lock from a killed rank would otherwise start a compiler.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        kill_tree(pid)
    end_s = time.monotonic() + 60
    while left := {pid: command for pid in read_all() if str(root) in (command := command_of(pid))}:
        assert time.monotonic() < end_s, f"these processes outlived their job: {left}"
        time.sleep(0.05)


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants. ninja gives its compilers process groups of their own, so a group is not
    enough.
    """
    rows = descendants(read_all(), pid)
    for below in [pid, *(row.pid for row in rows)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(below, signal.SIGKILL)


def look_at(job: HungJob, out: Path, capsys: Any, interval_s: float = 1.0) -> dict[str, Any]:
    """Return the JSON of `collect --json` for a job, with its exit code as "code" and its messages as "messages"."""
    capsys.readouterr()
    arguments = ["collect", "--json", "--to", str(out), "--interval", str(interval_s), str(job.pids[0])]
    code = main(arguments)
    printed = capsys.readouterr()
    return {**json.loads(printed.out), "code": code, "messages": printed.err}
