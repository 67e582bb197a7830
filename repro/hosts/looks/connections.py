"""Find the TCP connections between the processes of a job, and the bytes that wait in them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from repro.hosts.looks.proc import PROC, open_files, read_text

ESTABLISHED, CLOSE_WAIT, LISTEN = "01", "08", "0A"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of /proc/net/tcp. Queues are in bytes.

    local, remote   IP address and port in the kernel's hexadecimal form: "0100007F:1F90" is 127.0.0.1, port 8080
    state           the kernel's number of the TCP state in hexadecimal, such as ESTABLISHED ("01")
    inode           inode of the socket
    """

    local: str
    remote: str
    state: str
    send_queue: int
    receive_queue: int
    inode: int


@dataclass(frozen=True, slots=True)
class Connection:
    """One end of a TCP connection.

    pid              the process at this end
    peer             pid of the process at the other end; 0 if this process was not examined
    receive_queue    bytes that arrived and that `pid` has not read
    send_queue       bytes that `pid` sent and that the other end has not acknowledged
    closed_by_peer   whether the other end has closed the connection
    """

    pid: int
    peer: int
    port: int
    peer_port: int
    receive_queue: int
    send_queue: int
    closed_by_peer: bool


def parse_table(text: str) -> list[Row]:
    """Parse the text of /proc/net/tcp or /proc/net/tcp6. Malformed lines are left out."""
    rows = []
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) < 10 or ":" not in words[4]:
            continue
        sending, _, receiving = words[4].partition(":")
        try:
            rows.append(Row(words[1], words[2], words[3], int(sending, 16), int(receiving, 16), int(words[9])))
        except ValueError:
            continue
    return rows


def look_at_connections(pids: Collection[int], proc: Path = PROC) -> list[Connection]:
    """Return both ends of each connection between these processes.

    If the other end of a connection is closed, only the open end is returned; the closed end can be that of any
    process. A process whose file descriptors this user is not allowed to read is left out.
    """
    owners: dict[str, int] = {}  # "socket:[inode]" -> pid
    namespaces: dict[str, int] = {}  # network namespace -> a pid in it
    for pid in pids:
        try:
            for _, target in open_files(pid, proc):
                if target.startswith("socket:["):
                    owners.setdefault(target, pid)
            namespaces.setdefault((proc / str(pid) / "ns" / "net").readlink().name, pid)
        except OSError:
            continue
    ends: dict[tuple[str, str], tuple[int, Row]] = {}
    for pid in namespaces.values():
        for name in ("tcp", "tcp6"):
            try:
                text = read_text(proc / str(pid) / "net" / name, 64 << 20)
            except OSError:
                continue
            for row in parse_table(text):
                owner = owners.get(f"socket:[{row.inode}]")
                if owner is not None and row.state in (ESTABLISHED, CLOSE_WAIT):
                    ends[row.local, row.remote] = owner, row
    connections = []
    for (local, remote), (pid, row) in sorted(ends.items(), key=lambda item: item[1][1].inode):
        other = ends.get((remote, local))
        if other is not None or row.state == CLOSE_WAIT:
            connections.append(
                Connection(
                    pid, other[0] if other else 0, _port(local), _port(remote), row.receive_queue, row.send_queue,
                    row.state == CLOSE_WAIT,
                )
            )  # fmt: skip
    return connections


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)
