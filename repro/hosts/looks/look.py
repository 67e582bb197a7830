"""One look at a job: what the operating system reports about its processes, lock files and connections now."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from repro.hosts.looks.connections import look_at_connections
from repro.hosts.looks.jobs import Job
from repro.hosts.looks.lock_files import LockFile, look_at_locks
from repro.hosts.looks.machine import gpus, has_devices, memory_warnings, versions
from repro.hosts.looks.proc import Status, command_of, descendants, first_thread_cpu_s, kernel_place, read_all, uptime_s
from repro.hosts.looks.variables import Threads, lock_paths, waits_for_lock
from repro.ingest.host_look import FORMAT, VERSION

MAX_CHILDREN = 256
MAX_COMMAND = 300


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def look_at(
    job: Job, number: int, stacks: Mapping[int, Threads], hidden: Sequence[str], *, numbered: bool
) -> dict[str, Any]:
    """Examine the job once. Returns JSON values in the form that `repro.ingest` reads.

    number    the number of this look, from 1
    stacks    the threads of each process whose stacks could be taken at about this moment, by pid
    hidden    sentences about evidence that could not be taken
    numbered  True if the real ranks could not be found. Then the processes that can be ranks are numbered from 0, in
              the order of their pids
    """
    table = read_all()
    children = {pid: descendants(table, pid)[:MAX_CHILDREN] for pid in job.pids}
    family = {*job.pids, *(row.pid for rows in children.values() for row in rows)} & table.keys()
    waiting = {pid: list(lock_paths(threads, pid)) for pid, threads in stacks.items() if waits_for_lock(threads, pid)}
    named = {path: pid for pid, paths in waiting.items() for path in paths}
    locks = look_at_locks(family, table, named)
    return {
        "format": FORMAT,
        "version": VERSION,
        "host": host_name(),
        "look": number,
        "at_s": round(time.monotonic(), 3),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "job": job.name,
        "world_size": job.world_size,
        "missing_ranks": job.missing_ranks(_num_unreaped(job, table)),
        "hidden": list(hidden),
        "numbered": numbered,
        "has_devices": has_devices(),
        "warnings": memory_warnings(job.pids),
        "versions": versions(job.pids[0]) if job.pids else {},
        "gpus": gpus(),
        "processes": [_process(member, table.get(member.pid), children[member.pid]) for member in job.members],
        "locks": [_lock(lock, waiting, job, table) for lock in locks],
        "connections": _connections(job.pids),
    }


def _process(member: Any, status: Status | None, children: Collection[Status]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "pid": member.pid,
        "rank": member.rank,
        "role": member.role,
        "title": member.title[:MAX_COMMAND],
    }
    if status is None:
        return {**row, "state": "X"}
    function, call = kernel_place(status.pid)
    now_s = uptime_s()
    return {
        **row,
        "state": status.state,
        "cpu_s": status.cpu_s,
        "first_thread_cpu_s": first_thread_cpu_s(status.pid) or 0.0,
        "switches": status.switches,
        "age_s": round(now_s - status.started_s, 1),
        "resident_bytes": status.resident_bytes,
        "num_threads": status.num_threads,
        "tracer": status.tracer,
        "kernel_function": function,
        "system_call": call,
        "children": [
            {
                "pid": child.pid, "name": child.name, "command": _shortened(command_of(child.pid)),
                "state": child.state, "age_s": round(now_s - child.started_s, 1),
                "cpu_s": child.cpu_s + child.children_cpu_s,
            }
            for child in children
        ],
    }  # fmt: skip


def _num_unreaped(job: Job, table: Mapping[int, Status]) -> int:
    return sum(row.parent == job.launcher and row.state == "Z" for row in table.values()) if job.launcher else 0


def _shortened(command: str) -> str:
    """Shorten a command line in the middle. Keep the end, which is often the source file of a compiler."""
    half = MAX_COMMAND // 2
    return command if len(command) <= MAX_COMMAND else f"{command[:half]} … {command[-half:]}"


def _lock(
    lock: LockFile, waiting: Mapping[int, Sequence[str]], job: Job, table: Mapping[int, Status]
) -> dict[str, Any]:
    polling = [pid for pid, paths in waiting.items() if lock.path in paths]
    waiters = sorted({*lock.waiters, *polling})
    holders = [pid for pid in lock.holders if pid not in waiters]
    return {
        "path": lock.path, "kind": lock.kind, "holders": holders, "waiters": waiters, "hidden": lock.hidden,
        "age_s": lock.age_s, "holder_names": [_name(pid, job, table) for pid in holders],
    }  # fmt: skip


def _name(pid: int, job: Job, table: Mapping[int, Status]) -> str:
    """Describe a process: "rank 3", "process 77 (pip install …), since 40 s"."""
    if pid == 0:
        return "a process of another pid namespace"
    rank = next((member.rank for member in job.members if member.pid == pid), None)
    if rank is not None:
        return f"rank {rank}"
    age = f", since {uptime_s() - table[pid].started_s:.0f} s" if pid in table else ""
    return f"process {pid} ({command_of(pid)[:80]}{age})"


def _connections(pids: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "pid": row.pid, "peer": row.peer, "port": row.port, "peer_port": row.peer_port,
            "receive_queue": row.receive_queue, "send_queue": row.send_queue, "closed_by_peer": row.closed_by_peer,
        }
        for row in look_at_connections(pids)
    ]  # fmt: skip
