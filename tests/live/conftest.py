"""What a test that starts runs of the lab checks at its end: that they left nothing behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when a process, a listening port, a shared-memory entry or a temporary file outlives it."""
    temporary = Path(tempfile.mkdtemp())  # not below tmp_path, which is too long for the name of a socket
    monkeypatch.setenv("TMPDIR", str(temporary))
    shared_before, listening_before = set(os.listdir("/dev/shm")), _listeners()
    yield
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (
        _processes_of(tmp_path)
        or _listeners() - listening_before
        or _without_user(set(os.listdir("/dev/shm")) - shared_before)  # others' entries come before they are mapped
    ):
        time.sleep(0.1)
    assert not (alive := _processes_of(tmp_path)), alive
    assert _listeners() <= listening_before
    assert not (left := _without_user(set(os.listdir("/dev/shm")) - shared_before)), left
    assert not (left := list(temporary.iterdir())), left
    temporary.rmdir()
    for verdict in tmp_path.glob("*Z-*/verdict.json"):
        assert {path.name for path in verdict.parent.iterdir()} <= {
            *("run.json", "config.json", "verdict.json", "reference.json"),
            *("events", "fr", "logs", "env", "outputs", "stacks"),
            *("report.html", "timeline.svg", "trace.json"),
        }


def _listeners() -> set[tuple[int, int]]:
    """(port, pid) of what listens for processes that were started here."""
    found = set()
    for connection in psutil.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN and connection.pid:
            with contextlib.suppress(psutil.Error):
                if psutil.Process(connection.pid).cwd() == str(ROOT):
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
