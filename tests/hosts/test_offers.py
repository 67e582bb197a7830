"""What a job offers by itself: torch's worker server, the recorder's pipe, NCCL's RAS; and what the machine says."""

from __future__ import annotations

import http.server
import os
import socket
import socketserver
import threading

import pytest

from repro.hosts.looks import machine, offers
from repro.hosts.looks.jobs import Member
from repro.hosts.looks.rights import why_hidden

DUMP = b'{"entries": []}'


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The threads that answer here may get no processor for longer than a job is waited for."""
    monkeypatch.setattr(offers, "PATIENCE_S", 60.0)


def member(**environment):
    return Member(os.getpid(), 3, environment=environment)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        known = self.path == "/handler/fr_trace_json"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(DUMP if known else b"Handler not found")

    def log_message(self, *_):
        pass

    def address_string(self):
        return ""


def test_the_worker_server_is_asked_where_the_environment_names_its_socket(tmp_path):
    path = str(tmp_path / "server")
    with Server(path, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rank = member(TORCH_WORKER_SERVER_SOCKET=path)
        assert offers.ask_worker_server(rank, "fr_trace_json") == DUMP
        assert offers.ask_worker_server(rank, "dump_traceback") == b"", "an error is no answer"
        assert offers.ask_worker_server(member(), "fr_trace_json") == b""
        server.shutdown()
    assert offers.ask_worker_server(rank, "fr_trace_json") == b"", "nothing listens any more"


def test_a_recorder_dump_is_requested_through_the_pipe_and_awaited(tmp_path):
    pipe, dump = tmp_path / "pipe3.pipe", tmp_path / "trace_3"
    os.mkfifo(pipe)
    dump.write_bytes(b"an old one")
    os.utime(dump, (1, 1))
    reader = os.open(pipe, os.O_RDWR)  # a writer of its own, so that a read before the other one comes does not end

    def rank():
        assert os.read(reader, 8)
        dump.write_bytes(DUMP)

    thread = threading.Thread(target=rank)
    thread.start()
    process = member(TORCH_NCCL_DEBUG_INFO_PIPE_FILE=f"{tmp_path}/pipe", TORCH_FR_DUMP_TEMP_FILE=f"{tmp_path}/trace_")
    done = offers.request_dumps({3: process})
    thread.join()
    os.close(reader)
    assert offers.read_dump(done[3]) == DUMP


@pytest.mark.parametrize("place", ["nothing", "a pipe without a reader", "a regular file"])
def test_no_dump_is_requested_where_no_rank_listens_at_the_pipe(tmp_path, place):
    pipe = tmp_path / "pipe3.pipe"
    if place == "a pipe without a reader":
        os.mkfifo(pipe)
    elif place == "a regular file":
        pipe.write_bytes(b"precious")
    assert offers.request_dumps({3: member(TORCH_NCCL_DEBUG_INFO_PIPE_FILE=f"{tmp_path}/pipe")}) == {}
    assert place != "a regular file" or pipe.read_bytes() == b"precious", "only a pipe is written to"
    assert offers.request_dumps({3: member()}) == {}


def test_the_answer_of_nccls_ras_is_read_to_its_end():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"verbose status\n"):
                    asked += connection.recv(64)
                connection.sendall(b"OK\nNCCL version 2.28.3 compiled with CUDA 13.0\n\nJob summary\n")

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        answer = offers.ask_ras(f"127.0.0.1:{port}")
        thread.join()
    assert answer.startswith(b"NCCL version 2.28.3")
    assert offers.ask_ras(f"127.0.0.1:{port}") == b"", "nothing listens any more"


def test_kernel_lines_are_of_devices_and_of_the_jobs_own_processes(monkeypatch):
    messages = [
        (5.0, "NVRM: Xid (PCI:0000:5d:00): 79, GPU has fallen off the bus."),
        (50.0, "NVRM: Xid (PCI:0000:5d:00): 31, pid=7"),
        (60.0, "Out of memory: Killed process 8 (python3.11) total-vm:1kB, anon-rss:9kB"),
        (61.0, "Out of memory: Killed process 9 (mysqld) total-vm:1kB, anon-rss:9kB"),
        (62.0, "usb 1-1: new device"),
    ]
    monkeypatch.setattr(machine, "_messages", lambda log: iter(messages))
    monkeypatch.setattr(machine, "uptime_s", lambda: 100.0)
    lines = machine.kernel_lines(10.0, {"python3.11"})
    assert [line.partition("kernel: ")[2][:20] for line in lines] == ["NVRM: Xid (PCI:0000:", "Out of memory: Kille"]
    assert "Killed process 8" in lines[1] and lines[0][:4].isdigit()
    monkeypatch.setattr(machine, "uptime_s", lambda: 40.0)  # as in a time namespace: a message lies in the future
    with pytest.raises(machine.OtherClock):
        machine.kernel_lines(10.0, {"python3.11"})


@pytest.mark.parametrize(
    ("line", "file"),
    [("4:memory:/job", "memory/job/memory.oom_control"), ("0::/job", "job/memory.events")],
)
def test_a_control_group_that_ran_out_of_memory_is_reported(tmp_path, line, file):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "cgroup").write_text(f"{line}\n")
    counts = root / file
    counts.parent.mkdir(parents=True)
    counts.write_text("oom_kill_disable 0\noom_kill 0\n")
    assert machine.memory_warnings([7], proc, root) == []
    counts.write_text("oom 5\noom_kill 2\n")
    (warning,) = machine.memory_warnings([7, 8], proc, root)
    assert "process 7 ran out of memory" in warning and "ended 2 of" in warning


def test_versions_come_from_the_folders_of_loaded_libraries(tmp_path):
    packages = tmp_path / "lib" / "site-packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "nvidia_nccl_cu13-2.28.9.dist-info").mkdir()
    (packages / "torch" / "version.py").write_text("__version__ = '2.13.0+cu130'\n")
    process = tmp_path / "proc" / "7"
    process.mkdir(parents=True)
    (process / "root").symlink_to("/")
    names = ("torch/lib/libtorch_cpu.so", "nvidia/nccl/lib/libnccl.so.2")
    (process / "maps").write_text("".join(f"7f-8f r-xp 0 00:1 9   {packages}/{name}\n" for name in names))
    assert machine.versions(7, tmp_path / "proc") == {"torch": "2.13.0+cu130", "nccl": "2.28.9"}


@pytest.mark.parametrize(
    ("uid", "scope", "words"),
    [(os.geteuid() + 1, 0, "run collect as that user, as root"), (os.geteuid(), 1, "sysctl kernel.yama.ptrace_scope=0"),
     (os.geteuid(), 0, "PR_SET_DUMPABLE")],
)  # fmt: skip
def test_the_missing_right_is_named_with_what_gives_it(tmp_path, uid, scope, words):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text("7 (python) S 1" + " 0" * 48)
    (tmp_path / "7" / "status").write_text(f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
    yama = tmp_path / "sys" / "kernel" / "yama"
    yama.mkdir(parents=True)
    (yama / "ptrace_scope").write_text(f"{scope}\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("CapEff:\t0000000000000000\n")
    assert words in why_hidden(7, tmp_path)
    (tmp_path / "self" / "status").write_text("CapEff:\t0000000000080000\n")
    assert why_hidden(7, tmp_path) == "", "SYS_PTRACE allows it"
    assert why_hidden(8, tmp_path) == "process 8 has ended"
