"""What watching and agreeing cost a step of the engine: 8 forked ranks, gloo, the tiny preset, idle steps.

    python benchmarks/bench_engine.py [--ranks 8] [--rounds 7] [--json FILE]

Every rank holds one engine for each row and all ranks run 32 steps of one row after the other, round after round, so
that a busy machine slows all rows alike; the median round counts. Steps of dummy batches are the fastest there are, so
the shares below are upper bounds. The last row is the same as the first under TORCH_DISTRIBUTED_DEBUG=DETAIL, PyTorch's
own check of collectives, in ranks of their own since the setting is made when groups are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import NullObserver, Observer
from repro.record import Recorder
from repro.settings import RunSettings
from repro.worker import loopback_store

ROWS = ("nothing", "recorded", "recorded, agree", "recorded, strict")
CHECKS = {"nothing": "observe", "recorded": "observe", "recorded, agree": "agree", "recorded, strict": "strict"}


def run_rank(rank: int, num_ranks: int, rounds: int, rows: tuple[str, ...], folder: Path) -> dict[str, list[float]]:
    """Seconds of each round of 32 steps, by row."""
    torch.set_num_threads(1)
    server = RunSettings("any", "control", num_ranks=num_ranks).server()
    meeting = dist.FileStore(str(folder / "store"), num_ranks)
    store = loopback_store(meeting, rank, num_ranks)
    first = Communicator.connect(server.parallel, rank, store=store, timeout_s=300)
    engines = {}
    for row in rows:
        observer: Observer = NullObserver()
        if row != "nothing":
            observer = Recorder.open(folder / f"{row}-{rank}.wit", rank, num_ranks)
        prefixed = dist.PrefixStore(row, store)
        comm = Communicator(rank, first.device, first._groups, observer, prefixed)
        engines[row] = Engine(replace(server, checks=CHECKS[row]), comm)
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(rounds + 1):
        for row, engine in engines.items():
            begin = time.perf_counter()
            engine.serve([])
            seconds[row].append(time.perf_counter() - begin)
    return {row: times[1:] for row, times in seconds.items()}  # the first round warms up


def measure(num_ranks: int, rounds: int, rows: tuple[str, ...], debug: str) -> dict[str, float]:
    """Milliseconds of a step on rank 0, the median of the rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder, pids = Path(name), []
        for rank in range(num_ranks):
            pid = os.fork()
            if pid == 0:
                os.environ["TORCH_DISTRIBUTED_DEBUG"] = debug
                dist.set_debug_level_from_env()
                try:
                    seconds = run_rank(rank, num_ranks, rounds, rows, folder)
                    if rank == 0:
                        (folder / "seconds.json").write_text(json.dumps(seconds))
                finally:
                    os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        seconds = json.loads((folder / "seconds.json").read_text())
    return {row: statistics.median(times) / 32 * 1e3 for row, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    step_ms = measure(arguments.ranks, arguments.rounds, ROWS, "OFF")
    detail = measure(arguments.ranks, max(1, arguments.rounds // 2), ("nothing",), "DETAIL")
    step_ms["nothing, DETAIL"] = detail["nothing"]
    collectives = 1 + 2 * 8  # a step of 8 layers
    base = step_ms["nothing"]
    rows: list[dict[str, Any]] = [
        {
            "row": row, "step_ms": round(ms, 2), "ratio": round(ms / base, 4),
            "extra_ms_per_collective": round((ms - base) / collectives, 3),
        }
        for row, ms in step_ms.items()
    ]  # fmt: skip
    print(f"{arguments.ranks} ranks, {os.cpu_count()} cores, torch {torch.__version__}, gloo")
    print(f"{'row':18} {'step ms':>9} {'ratio':>8} {'extra ms a collective':>23}")
    for row in rows:
        print(f"{row['row']:18} {row['step_ms']:>9} {row['ratio']:>8} {row['extra_ms_per_collective']:>23}")
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        document = {**machine, "torch": torch.__version__, "commit": commit, "ranks": arguments.ranks, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
