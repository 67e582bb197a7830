"""Run `hmr collect` and `hmr bundle` as child processes. If one fails, the caller gets the reason, not an exception."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from repro.attach.vllm.cells.outcome import Answer

LOOK_S = 180.0
BUNDLE_S = 180.0


def collect(pid: int, to: Path) -> tuple[Answer | None, str]:
    """Run `collect` on the job of a process. Returns (verdict, ""), or (None, why there is no verdict).

    to: the folder into which `collect` writes
    """
    text, failure = _run(["collect", str(pid), "--to", str(to), "--json"], LOOK_S)
    try:
        return Answer.of(json.loads(text)), ""
    except (ValueError, KeyError, TypeError):
        return None, f"collect gave no verdict: {failure}"


def bundle(run: Path, to: Path) -> str:
    """Pack a folder into the zip file ``to``. Returns "", or the reason if this failed.

    run: a recording, or a folder that `collect` wrote
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    _, failure = _run(["bundle", str(run), "--to", str(to)], BUNDLE_S)
    return "" if to.is_file() else f"no bundle of {run.name}: {failure}"


def _run(words: list[str], limit_s: float) -> tuple[str, str]:
    """Run a command of `hmr`. Returns its standard output, and the reason to print if the command failed.

    The reason is why the command did not run to its end, else the last line of its standard error, else its exit code.
    There is a reason after a success, too, so the caller must find out by other means whether the command failed.

    words: the name of the command and its arguments; limit_s: after this many seconds the command is ended
    """
    environment = {name: value for name, value in os.environ.items() if name != "HMR_RECORD"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "repro", *words],
            env=environment, capture_output=True, text=True, timeout=limit_s, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "", f"it took longer than {limit_s:g} s"
    except OSError as error:
        return "", str(error)
    lines = done.stderr.strip().splitlines()
    return done.stdout, lines[-1] if lines else f"exit code {done.returncode}"
