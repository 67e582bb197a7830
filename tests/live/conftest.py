"""What a test that starts runs of the lab checks at its end: that they left nothing behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from repro.hosts.looks import py_spy


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """py-spy reads the symbols of torch, and shares the processors with the other workers of the test run."""
    monkeypatch.setattr(py_spy, "PATIENCE_S", 60.0)


@pytest.fixture
def leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when a process, a listening port, a shared-memory entry or a temporary file outlives it."""
    temporary = Path(tempfile.mkdtemp())  # not below tmp_path, which is too long for the name of a socket
    monkeypatch.setenv("TMPDIR", str(temporary))
    shared_before, listening_before = set(os.listdir("/dev/shm")), _listeners(temporary)

    def left() -> dict[str, Any]:
        """What is there at this moment. Other workers of the test run start and end processes all the time."""
        found = {
            "processes": _processes_of(tmp_path),
            "ports": _listeners(temporary) - listening_before,
            "shared memory": _without_user(set(os.listdir("/dev/shm")) - shared_before),
            "files": list(temporary.iterdir()),
        }
        return {what: names for what, names in found.items() if names}

    yield
    deadline = time.monotonic() + 60
    while (now := left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not now, now
    temporary.rmdir()
    for verdict in tmp_path.glob("*Z-*/verdict.json"):
        assert {path.name for path in verdict.parent.iterdir()} <= {
            *("run.json", "config.json", "verdict.json", "reference.json"),
            *("events", "fr", "logs", "env", "outputs", "stacks"),
            *("report.html", "timeline.svg", "trace.json"),
        }


def _listeners(temporary: Path) -> set[tuple[int, int]]:
    """(port, pid) of what listens for this test: in processes below this one, and in orphans with the test's TMPDIR."""
    found = set()
    for connection in psutil.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN and connection.pid:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(connection.pid)
                below = os.getpid() in (process.pid, *(parent.pid for parent in process.parents()))
                if below or process.environ().get("TMPDIR") == str(temporary):
                    found.add((connection.laddr.port, connection.pid))
    return found


def _without_user(names: set[str]) -> set[str]:
    """Shared-memory entries that no process maps: another program's are its own business, mapped or gone by now."""
    mapped = ""
    for process in psutil.process_iter() if names else ():
        with contextlib.suppress(OSError):
            mapped += Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
    return {name for name in names if f"/dev/shm/{name}" not in mapped and Path("/dev/shm", name).exists()}


def _processes_of(out: Path) -> list[str]:
    """Command lines of processes that work for a run below ``out``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(out) in " ".join([*process.cmdline(), process.environ().get("HMR_RUN_DIR", "")]):
                found.append(" ".join(process.cmdline()))
    return found
