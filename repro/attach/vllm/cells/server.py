"""One server: start it in its own process group, ask whether it is ready, and end the whole group."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from repro.hosts import processes

END_PATIENCE_S = 30.0
"""How many seconds after SIGTERM a server has to end by itself."""

QUESTION_S = 2.0
POLL_S = 0.1
MAX_LOG_BYTES = 1 << 16

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded at import, because little is safe between fork and exec


class Server:
    """A program that serves HTTP on ``port`` of this host, together with the processes that the program starts."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path) -> None:
        """Start the program. Raises OSError if the program cannot start or the log cannot be written."""
        self.port, self.log = port, log
        with log.open("ab") as file:
            self._child = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal must not reach the server, because `collect` looks at it first
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._child.pid

    def alive(self) -> bool:
        return self._child.poll() is None

    def exit_code(self) -> int | None:
        """Return the exit code, negative for a signal; None while the server runs."""
        return self._child.poll()

    def ready(self) -> bool:
        """Whether the server answers `/health` with 200, as vLLM does as soon as its engines have started."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=QUESTION_S) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError, ValueError):
            return False

    def end(self) -> list[int]:
        """Send SIGTERM to the server, wait at most END_PATIENCE_S seconds until it has ended, and kill what still runs.

        This includes the processes that the server started, even if the server ended by itself.
        Returns the pids of processes that did not end.
        """
        started = processes.with_descendants(self.pid)
        if self.alive():
            self._child.terminate()
        deadline = time.monotonic() + END_PATIENCE_S
        while self.alive() and time.monotonic() < deadline:
            started += [process for process in processes.with_descendants(self.pid) if process not in started]
            time.sleep(POLL_S)
        left = processes.kill(process for process in started if process.is_running())
        with contextlib.suppress(ProcessLookupError, PermissionError):  # members of the group whose parent had ended
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=processes.REAP_PATIENCE_S)
        return left

    def last_words(self) -> str:
        """Return the last line of the log that has "error" in it, else the last line; "" if the log is empty."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LOG_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "")

    def log_bytes(self) -> int:
        return self.log.stat().st_size


def free_port() -> int:
    """Return a port of this host on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Ask the operating system to send SIGTERM to the server when the experiment's process ends, even by SIGKILL."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
