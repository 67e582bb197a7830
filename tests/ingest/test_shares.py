"""Files are read in several processes with the result of one, and no process outlives the reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from ended import has_ended
from foreign import write
from hangs import CASES

from repro.ingest import shares
from repro.ingest.read import read


@pytest.fixture
def three_processors(monkeypatch):
    monkeypatch.setattr(shares, "MIN_SHARE_BYTES", 1)
    monkeypatch.setattr(shares, "_num_processors", lambda: 3)


@pytest.mark.parametrize("name", ["skipped", "different_sizes", "one_waits_in_gloo", "two_locks"])
def test_several_processes_read_what_one_reads(tmp_path, three_processors, name):
    folder = write(tmp_path, {**CASES[name]([0, 1, 2, 3]).files, "zz.bin": b"\0\1\2"})
    several = read([folder])
    shares._num_processors = lambda: 1
    alone = read([folder])
    assert (several.files, several.not_understood) == (alone.files, alone.not_understood)
    assert list(map(_plain, several.records)) == list(map(_plain, alone.records))


def _plain(record):
    if not hasattr(record, "groups"):
        return repr(record)
    return record.rank, [(repr(each.group), list(each.calls)) for each in record.groups], list(record.order)


def test_the_share_of_a_child_that_dies_is_read_here(tmp_path, three_processors):
    files = [(path, path.name) for path in sorted(write(tmp_path, dict.fromkeys("abc", b"x")).iterdir())]
    parent = os.getpid()

    def names(share):
        if os.getpid() != parent and share[0][1] == "b":
            os._exit(3)
        return [name for _, name in share], os.getpid() == parent

    answers = list(shares.read_shares(files, names))
    assert answers == [(["a"], True), (["b"], True), (["c"], False)]


def test_a_file_that_is_gone_before_it_is_read_is_left_to_its_reader(tmp_path):
    files = [(tmp_path / "gone", "gone")]
    assert list(shares.read_shares(files, lambda share: [name for _, name in share])) == [["gone"]]


CHILD_WAITS = """
import os, sys, time
from pathlib import Path
from repro.ingest import shares
shares.MIN_SHARE_BYTES, shares._num_processors = 1, lambda: 2
parent = os.getpid()
def read(share):
    if os.getpid() != parent:
        print(os.getpid(), flush=True)
        while os.getppid() == parent:
            time.sleep(0.005)
        return bytes(1 << 20)
    time.sleep(60)
list(shares.read_shares([(Path(__file__), "a"), (Path(__file__), "b")], read))
"""


def test_no_child_outlives_a_reader_that_is_killed(tmp_path):
    script = tmp_path / "reader.py"
    script.write_text(CHILD_WAITS)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as reader:
        child = int(reader.stdout.readline())
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        assert has_ended(child), child
