"""A substitute for `vllm serve` in the tests of `cells`: two ranks without torch, and /health once they are ready.

    python standin_server.py serve KIND --port P [flags of vllm serve, ignored]

Each rank is a process with RANK and WORLD_SIZE. KIND is the model's name and says what the ranks do at their start:

    builds     build one module under a lock, unless the cache has it; the build ends once the server was looked at
    locks      rank 0 holds the lock in a collective, and rank 1 waits for the lock
    moves      issue collectives for ever, and never become ready
    refuses    the server ends at once, with an error
"""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

NUM_RANKS = 2
BUILD = "import glob, sys\nwhile not glob.glob(sys.argv[1]): sum(range(100_000))"


def main() -> int:
    kind, port = sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1])
    if "RANK" in os.environ:
        rank(kind, Path(os.environ["TORCH_EXTENSIONS_DIR"]), port)
        return 0
    print("starts", flush=True)
    if kind == "refuses":
        print("ValueError: the flags do not fit together")
        return 3
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, "RANK": str(number), "WORLD_SIZE": str(NUM_RANKS), "MASTER_PORT": str(port)},
        )
        for number in range(NUM_RANKS)
    ]

    def end(number: int, frame: FrameType | None) -> None:
        for each in ranks:
            each.terminate()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    cache = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    while not all((cache / f"{port}.ready{number}").exists() for number in range(NUM_RANKS)):
        time.sleep(0.05)
    serve(port)
    return 0


def rank(kind: str, cache: Path, port: int) -> None:
    from hybrid_moe_ref.parallel.observer import Collective
    from repro.attach.record import rank as this

    this.become_from_environment()
    recorded = this.current
    assert recorded is not None
    me = recorded.rank
    print(f"rank {me} starts", flush=True)

    def collective(blocks: bool = False) -> None:
        entry = Collective("ep", "all_gather", "layers.0.moe", (8,), "float32")
        with recorded.lock:
            recorded.recorder.enter(entry)
        if blocks:
            signal.pause()
        with recorded.lock:
            recorded.recorder.leave(entry)

    while kind == "moves":
        collective()
        time.sleep(0.02)
    module, first = cache / "module.so", cache / "rank0.holds"
    if kind == "locks" and me == 1:
        while not first.exists():
            time.sleep(0.01)
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kind == "locks":
            first.touch()
            collective(blocks=True)
        if not module.exists():
            print(f"rank {me} builds", flush=True)
            recorded.local_event("build_begin", "extension fused_moe")
            subprocess.run([sys.executable, "-S", "-c", BUILD, os.environ["STANDIN_BUILD_UNTIL"]], check=True)
            recorded.local_event("build_end", "extension fused_moe")
            module.touch()
    collective()
    (cache / f"{port}.ready{me}").touch()
    signal.pause()


def serve(port: int) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with contextlib.suppress(KeyboardInterrupt), http.server.HTTPServer(("127.0.0.1", port), Health) as server:
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
