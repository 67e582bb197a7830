"""Run torchrun on the file that `minimise` wrote, as somebody does who gets this file in a bug report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from repro.hosts import processes

CHECK_DEADLINE_S = 90.0


def confirm(path: Path, num_ranks: int) -> str:
    """Run torchrun on the script ``path``. Returns the lines that it prints about its hang, or why it printed none."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    code, output = run_within([*torchrun, str(path)], CHECK_DEADLINE_S)
    if code is None:
        return f"it did not end within {CHECK_DEADLINE_S:g} s"
    lines = [line.strip() for line in output.splitlines() if line.startswith(("HANG", "  ranks"))]
    return "; ".join(lines) if code == 1 and lines else f"exit code {code}, and no hang"


def run_within(command: list[str], limit_s: float) -> tuple[int | None, str]:
    """Run a program for at most ``limit_s`` seconds. Returns (exit code, standard output); (None, "") after a timeout.

    If the program does not end in time, or the user interrupts, the program and its descendants are killed.
    """
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with job:
        try:
            output, _ = job.communicate(timeout=limit_s)
            return job.returncode, output
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            processes.kill(processes.with_descendants(job.pid))
