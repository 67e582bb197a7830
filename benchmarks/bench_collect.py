"""Measure what `collect` does to a job that it looks at: the results, the step times, and how long a look takes.

    python benchmarks/bench_collect.py [--steps 3000] [--json FILE]

A gloo job of two ranks trains a small model under DistributedDataParallel, first alone, then with one `collect` after
another beside it. The digest of all parameters after the last step must be the same in both runs.

Exits with 1 if the results differ, if a look takes longer than 10 s, or if a look calls the job anything but clean.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from machine import commit, cpu, versions, write

NUM_RANKS = 2
LONGEST_LOOK_S = 10.0

PROGRAM = """
import hashlib, json, os, sys, time
import torch
import torch.distributed as dist

torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(
    torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(dist.get_rank())
dist.barrier()
open(sys.argv[2], "w").close()
seconds = []
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    model(torch.randn(32, 64, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
digest = hashlib.sha256()
for parameter in model.parameters():
    digest.update(parameter.detach().numpy().tobytes())
if dist.get_rank() == 0:
    print(json.dumps({"digest": digest.hexdigest(), "seconds": seconds}))
dist.destroy_process_group()
"""


def start(steps: int, started: Path) -> list[subprocess.Popen[str]]:
    """Start the ranks of one job, and wait until they train. started: a file that they make when they train"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": str(NUM_RANKS), "LOCAL_WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, str(steps), str(started)]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(NUM_RANKS)
    ]
    while not started.exists():
        if any(rank.poll() is not None for rank in ranks):
            fail(ranks, "a rank of the job ended before it trained")
        time.sleep(0.05)
    return ranks


def fail(ranks: list[subprocess.Popen[str]], why: str) -> NoReturn:
    for rank in ranks:
        rank.kill()
    raise SystemExit(why)


def result_of(ranks: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """Wait for a job; returns the digest of its parameters and the seconds of each step."""
    printed = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        fail(ranks, "a rank of the job failed")
    result: dict[str, Any] = json.loads(printed[0])
    return result


def look(pid: int, folder: Path) -> tuple[str, float]:
    """Run `collect` on the job. Return the verdict ("" if the job had ended) and the seconds that `collect` took."""
    command = [sys.executable, "-m", "repro", "collect", "--json", "--to", str(folder), str(pid)]
    began_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    took_s = time.monotonic() - began_s
    return json.loads(done.stdout)["verdict"] if done.stdout else "", took_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    looks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = result_of(start(args.steps, folder / "alone"))
        ranks = start(args.steps, folder / "looked_at")
        while ranks[0].poll() is None:
            looks.append(look(ranks[0].pid, folder))
        looked_at = result_of(ranks)
    looks = [(verdict, took_s) for verdict, took_s in looks if verdict][:-1]  # the job ends during the last one
    rows = [
        {"looked_at": name == "looked at", "median_ms": statistics.median(run["seconds"]) * 1e3,
         "longest_ms": max(run["seconds"]) * 1e3}
        for name, run in (("alone", alone), ("looked at", looked_at))
    ]  # fmt: skip
    same = alone["digest"] == looked_at["digest"]
    longest_s = max((took_s for _, took_s in looks), default=0.0)
    verdicts = sorted({verdict for verdict, _ in looks})
    print(f"results: {'equal to the last bit' if same else 'DIFFERENT'}; load {os.getloadavg()[0]:.1f}")
    print(f"{len(looks)} looks: {', '.join(verdicts) or 'none'}; the longest took {longest_s:.1f} s")
    for row in rows:
        print(f"looked at {row['looked_at']}: median {row['median_ms']:.2f} ms, longest {row['longest_ms']:.1f} ms")
    if args.json:
        write(args.json, {
            "hardware": cpu(), "versions": versions(), "commit": commit(), "load": os.getloadavg()[0],
            "equal": same, "looks": len(looks), "longest_look_s": longest_s, "verdicts": verdicts, "rows": rows,
        })  # fmt: skip
    return int(not same or longest_s > LONGEST_LOOK_S or set(verdicts) - {"clean"} != set())


if __name__ == "__main__":
    sys.exit(main())
