"""Parse what /proc reports about a process. The parsers take text, so that tests need no process.

A file of /proc can vanish at any read, or belong to another user. For a process that has ended, most readers return
None or an empty value. For a file that this user is not allowed to read, they raise PermissionError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
MAX_BYTES = 4 << 20
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Status:
    """One process at one moment, from /proc/PID/stat and /proc/PID/status.

    state           R runs, S sleeps, D waits for a device, T suspended by a signal, t by a debugger,
                    Z ended and not reaped
    cpu_s           CPU seconds of all its threads
    children_cpu_s  CPU seconds of its children that have ended
    started_s       when it started, in seconds since the boot of the host
    switches        how often its first thread left a processor, voluntarily or not
    caught          numbers of the signals for which it has handlers
    tracer          pid of the debugger that is attached; 0 if there is none
    namespace_pid   its pid in its own pid namespace, for example in its container
    """

    pid: int
    parent: int
    name: str
    state: str
    cpu_s: float
    children_cpu_s: float
    started_s: float
    resident_bytes: int = 0
    switches: int = 0
    num_threads: int = 1
    uid: int = 0
    tracer: int = 0
    caught: frozenset[int] = frozenset()
    namespace_pid: int = 0


def parse_status(stat: str, status: str) -> Status:
    """Parse the texts of /proc/PID/stat and /proc/PID/status. Raises ValueError for malformed text."""
    name = stat[stat.index("(") + 1 : stat.rindex(")")]  # a process name may contain brackets and spaces
    fields = stat[stat.rindex(")") + 2 :].split()
    if len(fields) < 20:
        raise ValueError(f"a line of /proc/PID/stat has {len(fields)} fields after the process name, fewer than 20")
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)

    def number(key: str, place: int = 0, base: int = 10) -> int:
        words = lines.get(key, "").split()
        return int(words[place], base) if words else 0

    mask = number("SigCgt", base=16)
    return Status(
        pid=int(stat[: stat.index(" ")]),
        parent=int(fields[1]),
        name=name,
        state=fields[0],
        cpu_s=(int(fields[11]) + int(fields[12])) / CLOCK_TICKS,
        children_cpu_s=(int(fields[13]) + int(fields[14])) / CLOCK_TICKS,
        started_s=int(fields[19]) / CLOCK_TICKS,
        resident_bytes=number("VmRSS") * 1024,
        switches=number("voluntary_ctxt_switches") + number("nonvoluntary_ctxt_switches"),
        num_threads=int(fields[17]),
        uid=number("Uid", 1),
        tracer=number("TracerPid"),
        caught=frozenset(bit + 1 for bit in range(64) if mask >> bit & 1),
        namespace_pid=number("NSpid", -1),
    )


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Return at most the first ``limit`` bytes of a file of /proc as text.

    Raises OSError. If the process has ended, this is a ProcessLookupError or FileNotFoundError.
    """
    with path.open("rb") as file:
        return file.read(limit).decode(errors="replace")


def read_status(pid: int, proc: Path = PROC) -> Status | None:
    """Return the status of a process; None if the process has ended. Every user is allowed to read a status."""
    try:
        return parse_status(read_text(proc / str(pid) / "stat"), read_text(proc / str(pid) / "status"))
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None


def first_thread_cpu_s(pid: int, proc: Path = PROC) -> float | None:
    """Return the CPU seconds of a process's first thread, which runs the program; None if the process has ended."""
    try:
        stat = read_text(proc / str(pid) / "task" / str(pid) / "stat")
        fields = stat[stat.rindex(")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
        return None


def read_all(proc: Path = PROC) -> dict[int, Status]:
    """Return the status of every process that this user can see, by pid."""
    rows = (read_status(int(name), proc) for name in os.listdir(proc) if name.isdigit())
    return {row.pid: row for row in rows if row is not None}


def read_words(pid: int, name: str, proc: Path = PROC) -> list[str]:
    """Return the strings of a file of a process in /proc; [] if the process has ended.

    name: "cmdline" (the arguments) or "environ" (the environment variables, as "NAME=value")

    Raises PermissionError if this user is not allowed to read the file.
    """
    try:
        return [word for word in read_text(proc / str(pid) / name).split("\0") if word]
    except (FileNotFoundError, ProcessLookupError):
        return []


def command_of(pid: int, proc: Path = PROC) -> str:
    """Return the command line of a process, or the title that the process set; "" if the process has ended."""
    return " ".join(read_words(pid, "cmdline", proc)).strip()


def environment_of(pid: int, proc: Path = PROC) -> dict[str, str]:
    """Return the environment with which a process started, without later changes. Raises PermissionError."""
    return dict(word.split("=", 1) for word in read_words(pid, "environ", proc) if "=" in word)


def open_files(pid: int, proc: Path = PROC) -> Iterator[tuple[int, str]]:
    """Yield (descriptor, target) for each open file of a process: (3, "/tmp/x.lock") or (4, "socket:[77]").

    Raises PermissionError if this user is not allowed to see the files.
    """
    folder = proc / str(pid) / "fd"
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return
    for name in names:
        try:
            yield int(name), os.readlink(folder / name)
        except (FileNotFoundError, ProcessLookupError):
            continue


def kernel_place(pid: int, proc: Path = PROC) -> tuple[str, str]:
    """Return where a process waits in the kernel: (function of the kernel, system call with its arguments).

    A part that this user is not allowed to read is "".
    """
    texts = []
    for name in ("wchan", "syscall"):
        try:
            texts.append(read_text(proc / str(pid) / name).strip())
        except OSError:
            texts.append("")
    return "" if texts[0] == "0" else texts[0], texts[1]


def descendants(table: Mapping[int, Status], pid: int) -> list[Status]:
    """Return the descendants of a process, parents first."""
    children: dict[int, list[Status]] = {}
    for row in table.values():
        children.setdefault(row.parent, []).append(row)
    rows = list(children.get(pid, []))
    for row in rows:
        rows += children.get(row.pid, [])
    return rows


def uptime_s(proc: Path = PROC) -> float:
    """Return the seconds since the boot of the host."""
    return float(read_text(proc / "uptime").split()[0])
