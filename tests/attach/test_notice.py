"""Lines that the recorder and the guard print into the log of a program that is not ours."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import threading

import pytest

from repro.attach.notice import notice


def test_a_line_is_one_write_so_lines_of_ranks_that_share_a_log_do_not_mix():
    ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)  # each write of the process arrives as one packet
    with ours, theirs:
        ours.settimeout(60)
        subprocess.run(
            [sys.executable, "-c", "from repro.attach.notice import notice; notice('a line'); notice('the next')"],
            stderr=theirs,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            check=True,
        )
        assert [ours.recv(100), ours.recv(100)] == [b"a line\n", b"the next\n"]


def test_lines_of_threads_do_not_mix(monkeypatch):
    class Raw(io.StringIO):
        """A stream that lets another thread run after each write."""

        def write(self, text):
            written = super().write(text)
            turn.wait(60)
            return written

    turn, stream = threading.Barrier(2), Raw()
    monkeypatch.setattr(sys, "stderr", stream)
    threads = [threading.Thread(target=notice, args=(f"line of thread {number}",)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(stream.getvalue().splitlines()) == ["line of thread 0", "line of thread 1"]


class NoFlush:
    write = print


@pytest.mark.parametrize("stream", ["none", "closed", "full", "without flush"])
def test_a_broken_standard_error_does_not_reach_the_program(monkeypatch, stream):
    closed = io.StringIO()
    closed.close()
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - its close raises, too
    monkeypatch.setattr(
        sys, "stderr", {"none": None, "closed": closed, "full": full, "without flush": NoFlush()}[stream]
    )
    notice("a line that nobody can read")
    with pytest.raises(OSError):
        full.write("x\n")
    with contextlib.suppress(OSError):
        full.close()
