"""The lock of a build: who waits for it learns its holder, and does not wait for one that has ended."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hybrid_moe_kernels.build_lock import BuildLock, LockTimeout

from hybrid_moe_ref.files.holders import who_has_open

pytestmark = pytest.mark.timeout(300)  # one run compiles, on machines that may have other things to do


def hold(path, rank, until):
    """A process that holds the lock, alive or dead when this returns."""
    code = f"""
import sys, time
from pathlib import Path
from hybrid_moe_kernels.build_lock import BuildLock
with BuildLock(Path({str(path)!r}), {rank}, 1.0) as lock:
    print("held", flush=True)
    while True:
        {until}
        time.sleep(0.05)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_who_waits_for_the_lock_learns_its_holder_and_since_when(tmp_path):
    holder = hold(tmp_path / "lock", 3, "lock.beat()")
    events = []
    try:
        with (
            pytest.raises(
                LockTimeout, match=rf"held by rank 3 \(pid {holder.pid} on .*\), for .* s; its last heartbeat"
            ),
            BuildLock(tmp_path / "lock", 0, 0.7, lambda *event: events.append(event)),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert events[0] == ("lock_wait", str(tmp_path / "lock"), holder.pid)
    assert ("heartbeat", "waits for lock of rank 3", -1) in events


def test_a_holder_that_gives_no_sign_of_life_is_not_waited_for_until_the_deadline(tmp_path):
    holder = hold(tmp_path / "lock", 3, "pass")
    lock = BuildLock(tmp_path / "lock", 0, deadline_s=3600.0, stale_s=0.5)  # the test's own limit comes before
    try:
        with pytest.raises(LockTimeout, match="last heartbeat"), lock:
            pass
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_of_a_killed_holder_is_had_at_once_and_leaves_nothing(tmp_path):
    holder = hold(tmp_path / "lock", 3, "lock.beat()")
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock").exists()
    with BuildLock(tmp_path / "lock", 0, 0.5) as lock:
        assert (lock.holder().rank, lock.holder().pid) == (0, os.getpid())
    assert not (tmp_path / "lock").exists()


def test_who_has_a_file_open_is_found_and_nobody_is_certain(tmp_path):
    path = tmp_path / "lock"
    path.write_text("")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"f = open({str(path)!r}); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    assert who_has_open(path) == holder.pid
    holder.kill()
    holder.communicate()
    assert who_has_open(path) == 0
    assert who_has_open(tmp_path / "none") == 0
