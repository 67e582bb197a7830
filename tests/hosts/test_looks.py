"""What /proc, py-spy and the variables of a program say, read from texts and from folders that look like /proc."""

from __future__ import annotations

import os

import pytest

from repro.hosts.looks import connections, lock_files
from repro.hosts.looks.jobs import Job, Member
from repro.hosts.looks.proc import CLOCK_TICKS, parse_status
from repro.hosts.looks.variables import ranks_by_variables, stripped

STAT = "4242 (pt) main (x) S 1 4242 4242 0 -1 0 0 0 0 0 {} {} 30 10 20 0 7 0 {} 0 0"
STATUS = """Name:\tpt) main (x
State:\tS (sleeping)
TracerPid:\t99
Uid:\t1000\t1001\t1000\t1000
NSpid:\t4242\t17
VmRSS:\t   2048 kB
SigCgt:\t0000000000000a00
voluntary_ctxt_switches:\t12
nonvoluntary_ctxt_switches:\t3
"""
LOCKS = """1: FLOCK  ADVISORY  WRITE 4242 00:2f:1234 0 EOF
1: -> FLOCK  ADVISORY  WRITE 4243 00:2f:1234 0 EOF
2: POSIX  ADVISORY  READ 0 08:01:77 0 EOF
3: OFDLCK ADVISORY  WRITE -1 08:01:78 0 EOF
garbage
4: FLOCK  ADVISORY  WRITE x 00:2f:9 0 EOF
"""
TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:A001 0100007F:B002 01 00000010:00000020 00:00000000 00000000  1000        0 501 1 0 20 4 30 10 -1
   1: 0100007F:A003 0100007F:B004 08 00000000:00000000 00:00000000 00000000  1000        0 502 1 0 20 4 30 10 -1
   2: broken
"""


def test_a_process_whose_name_holds_brackets_is_read():
    status = parse_status(STAT.format(2 * CLOCK_TICKS, CLOCK_TICKS, 50 * CLOCK_TICKS), STATUS)
    assert (status.pid, status.parent, status.name, status.state) == (4242, 1, "pt) main (x", "S")
    assert (status.cpu_s, status.started_s, status.switches) == (3.0, 50.0, 15)
    assert (status.uid, status.tracer, status.namespace_pid, status.resident_bytes) == (1001, 99, 17, 2 << 20)
    assert status.caught == {10, 12}, "SIGUSR1 and SIGUSR2 by the mask"


@pytest.mark.parametrize("text", ["", "1 (python", "x (y) S 1", "1 (python) S"])
def test_a_stat_line_that_is_cut_raises_value_error(text):
    with pytest.raises(ValueError):
        parse_status(text, STATUS)


def test_the_table_of_locks_tells_holders_from_waiters():
    entries = lock_files.parse_table(LOCKS)
    assert [(entry.kind, entry.pid, entry.inode, entry.waits) for entry in entries] == [
        ("flock", 4242, 1234, False), ("flock", 4243, 1234, True), ("posix", 0, 77, False), ("ofdlck", 0, 78, False),
    ]  # fmt: skip


def test_queues_and_closed_ends_of_connections_are_read():
    one, two = connections.parse_table(TCP)
    assert (one.send_queue, one.receive_queue, one.inode, one.state) == (16, 32, 501, connections.ESTABLISHED)
    assert two.state == connections.CLOSE_WAIT


def thread(*frames):
    return {"thread_name": "MainThread", "frames": list(frames)}


def frame(name, variables, file="train.py"):
    rows = [{"name": key, "repr": text} for key, text in variables.items()]
    return {"name": name, "filename": file, "short_filename": file, "line": 1, "locals": rows}


def test_ranks_come_from_variables_only_if_they_are_all_different():
    stacks = {
        pid: [thread(frame("step", {"rank": "9"}), frame("main", {"rank": str(rank), "world_size": "2"}))]
        for pid, rank in ((7, 0), (8, 1))
    }
    assert ranks_by_variables(stacks) == ({7: 0, 8: 1}, 2), "the outermost frame counts"
    assert ranks_by_variables({**stacks, 9: stacks[8]})[0] == {}
    assert ranks_by_variables({**stacks, 9: []})[0] == {}, "one process is not seen"
    assert ranks_by_variables({7: [thread(frame("main", {"rank": "5", "world_size": "2"}))]}) == ({}, None)


def test_prompts_samples_and_passwords_are_not_kept():
    group = "<torch._C._distributed_c10d.ProcessGroup at 0x7f01>"
    row = frame("step", {"prompt": '"my secret"', "token": '"hf_secret"', "tp": group, "lock_path": '"/tmp/a.lock"'})
    wrapper = frame("wrapper", {"args": '("my secret", 2)', "kwargs": f'{{"group": {group}, "object": "my secret"}}'})
    text = str(stripped([thread(wrapper, row)], 7, ""))
    assert "secret" not in text and "0x7f01" in text and "/tmp/a.lock" in text


def test_a_rank_is_missing_only_where_this_host_should_run_it():
    members = tuple(Member(pid, rank) for pid, rank in ((10, 0), (11, 1), (13, 3)))
    assert Job("a", members, 8, 4).missing_ranks(0) == [2], "a gap; ranks 4-7 may run elsewhere"
    assert Job("a", members, 5, 5).missing_ranks(0) == [2, 4]
    assert Job("a", members, 5).missing_ranks(2) == [2, 4], "two children of the launcher have ended"
    assert Job("a", members).missing_ranks(0) == []
    assert Job("a", (*members, Member(12)), 4).missing_ranks(0) == [], "the rank of one process is not known"


def test_a_lock_file_is_found_with_its_holder_and_without(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    pid = os.getpid()
    (nobody,) = lock_files.look_at_locks([], [pid], {str(lock): pid})
    assert (nobody.kind, nobody.holders) == ("baton", [])
    with lock.open():
        (held,) = (row for row in lock_files.look_at_locks([pid], [pid], {}) if row.path == str(lock))
    assert (held.kind, held.holders, held.hidden) == ("baton", [pid], 0)
    assert lock_files.look_at_locks([], [pid], {str(tmp_path / "gone"): pid}) == []
