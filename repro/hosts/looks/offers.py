"""Ask the processes of a job for evidence, through interfaces that these processes have opened for this purpose.

The interfaces are torch's worker server, torch's dump pipe (a byte in this pipe requests a dump of the Flight
Recorder), and NCCL's RAS (its reliability service). If a process has opened no such interface, nothing is sent to this
process.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hybrid_moe_ref.files import open_regular
from repro.hosts.looks.jobs import Member
from repro.hosts.looks.proc import PROC

PATIENCE_S = 2.0
MAX_ANSWER_BYTES = 64 << 20
RAS_PORT = 28028
SERVER_SOCKET = "TORCH_WORKER_SERVER_SOCKET"
PIPE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
_DUMP_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_DEFAULT_DUMPS = ("/tmp/nccl_trace_rank_", "{home}/.cache/torch/comm_lib_trace_rank_")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(self._path)


def ask_worker_server(member: Member, question: str) -> bytes:
    """Ask the HTTP server that torch's `worker_main` opens in a rank. Returns b"" if there is no server or no answer.

    question: the name of a handler of this server: "dump_traceback" for the stacks; "fr_trace_json" or
    "dump_nccl_trace_json" for a Flight Recorder dump
    """
    path = (member.environment or {}).get(SERVER_SOCKET, "")
    if not path.startswith("/"):
        return b""
    connection = _UnixConnection(f"{PROC}/{member.pid}/root{path}")
    try:
        connection.request("POST", f"/handler/{question}")
        answer = connection.getresponse()
        data = answer.read(MAX_ANSWER_BYTES)
        return data if answer.status == 200 else b""
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()


def request_dumps(members: Mapping[int, Member]) -> dict[int, Path]:
    """Request Flight Recorder dumps from the ranks that opened torch's dump pipe. members: the process of each rank.

    Returns the dump file of each rank whose file changed within PATIENCE_S seconds.
    """
    waiting = {}
    for rank, member in members.items():
        pipe = f"{PROC}/{member.pid}/root{(member.environment or {}).get(PIPE, '')}{rank}.pipe"
        files = {path: _stamp(path) for path in _dump_files(member, rank)}
        if (member.environment or {}).get(PIPE) and _write_to_pipe(pipe):
            waiting[rank] = files
    done: dict[int, Path] = {}
    deadline = time.monotonic() + PATIENCE_S
    while waiting.keys() - done.keys() and time.monotonic() < deadline:
        time.sleep(0.05)
        for rank in waiting.keys() - done.keys():
            changed = [path for path, before in waiting[rank].items() if _stamp(path) not in (before, 0)]
            if changed:
                done[rank] = changed[0]
    return done


def _dump_files(member: Member, rank: int) -> Iterator[Path]:
    environment = member.environment or {}
    named = [environment[name] for name in _DUMP_FILES if environment.get(name)]
    defaults = [text.format(home=environment.get("HOME", "/root")) for text in _DEFAULT_DUMPS]
    for stem in named or defaults:
        yield Path(f"{PROC}/{member.pid}/root{stem}{rank}")


def _write_to_pipe(path: str) -> bool:
    """Write the byte that requests a dump. Returns True if the pipe exists, has a reader, and accepted the byte."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return False
        return os.write(descriptor, b"1") == 1
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def read_dump(path: Path) -> bytes:
    """Return the bytes of a dump file. Raises OSError; ValueError if the file is too large or not a regular file."""
    with open_regular(path, MAX_ANSWER_BYTES) as file:
        return file.read()


def ask_ras(address: str) -> bytes:
    """Return what NCCL's RAS prints about its job; b"" if nothing listens. address: "host:port", "" for the default."""
    host, _, port = address.rpartition(":")
    number = int(port) if re.fullmatch(r"\d{1,5}", port) else RAS_PORT
    chunks: list[bytes] = []
    with contextlib.suppress(OSError), socket.create_connection((host or "localhost", number), PATIENCE_S) as server:
        server.sendall(b"timeout 2\nverbose status\n")
        server.settimeout(PATIENCE_S + 1)
        while (chunk := server.recv(1 << 16)) and sum(map(len, chunks)) < MAX_ANSWER_BYTES:
            chunks.append(chunk)
    text = b"".join(chunks)
    return text.removeprefix(b"OK\n")  # RAS answers "OK" to the first line that was sent
