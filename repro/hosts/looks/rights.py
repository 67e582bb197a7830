"""Explain why this user is not allowed to inspect a process, and how to get the permission."""

from __future__ import annotations

import os
from pathlib import Path

from repro.hosts.looks.proc import PROC, read_status, read_text

SYS_PTRACE = 19


def why_hidden(pid: int, proc: Path = PROC) -> str:
    """Return a sentence that names the missing permission and how to get it; "" if no missing permission is found.

    If the process has ended, the sentence says so.
    """
    status = read_status(pid, proc)
    if status is None:
        return f"process {pid} has ended"
    scope = _number(proc / "sys/kernel/yama/ptrace_scope")
    if _may_trace_all(proc):
        return ""
    if status.uid != os.geteuid():
        return (
            f"process {pid} belongs to uid {status.uid}, but collect runs as uid {os.geteuid()}: run collect as that "
            "user, as root, or in a container with the capability SYS_PTRACE"
        )
    if scope >= 1:
        return (
            f"kernel.yama.ptrace_scope is {scope}, so collect is only allowed to look at processes that it started: "
            "run collect as root, or once: sysctl kernel.yama.ptrace_scope=0"
        )
    return (
        f"process {pid} forbids its own user to inspect it (prctl PR_SET_DUMPABLE, or capabilities of its own): run "
        "collect as root, or in a container with the capability SYS_PTRACE"
    )


def _may_trace_all(proc: Path) -> bool:
    try:
        lines = dict(line.split(":", 1) for line in read_text(proc / "self/status").splitlines() if ":" in line)
        return bool(int(lines["CapEff"], 16) >> SYS_PTRACE & 1)
    except (OSError, ValueError, KeyError):
        return False


def _number(path: Path) -> int:
    try:
        return int(read_text(path))
    except (OSError, ValueError):
        return 0
