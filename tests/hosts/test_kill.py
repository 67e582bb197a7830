"""Ending processes: none of them acts on the end of another."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil

from repro.hosts import processes

WATCHES_ITS_PEER = """
import pathlib, sys
print("ready", flush=True)
sys.stdin.buffer.read()  # until the peer has ended
pathlib.Path(sys.argv[1]).write_text("I saw my peer end")
print("wrote", flush=True)
"""


class Slow(psutil.Process):
    """A process after whose end nobody else is killed until a peer has had the time to act on it."""

    survivor: subprocess.Popen[bytes]

    def kill(self) -> None:
        super().kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.survivor.wait(timeout=0.5)


def test_a_process_that_is_to_be_killed_does_not_see_the_others_end(tmp_path: Path) -> None:
    peer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
    watching = subprocess.Popen(
        [sys.executable, "-c", WATCHES_ITS_PEER, str(tmp_path / "after")], stdin=peer.stdout, stdout=subprocess.PIPE
    )
    assert peer.stdout is not None and watching.stdout is not None
    peer.stdout.close()
    try:
        assert watching.stdout.readline() == b"ready\n"
        first = Slow(peer.pid)
        first.survivor = watching
        assert processes.kill([first, psutil.Process(watching.pid)]) == []
        assert not (tmp_path / "after").exists()
    finally:
        for process in (peer, watching):
            process.kill()
            process.wait()
        watching.stdout.close()
