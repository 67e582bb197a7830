"""Measure what `record` costs a program: microseconds a collective, and the share of a training step.

    python benchmarks/bench_record.py [--rounds 7] [--json FILE]

Each program runs with and without the recorder in turn, each time in a process of its own, and the fastest of all
rounds counts. The collective is an all_reduce of eight numbers in a gloo group of one rank, which has nobody to wait
for. The step is that of a small transformer under DistributedDataParallel, alone in its group.

Exits with 1 if a step takes more than 1 % longer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import commit, cpu, mark, versions, write

from repro.commands.record import SITE

MOST_SHARE = 0.01

PROGRAM = """
import sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
torch.set_num_threads(1)
torch.manual_seed(0)

def best(call, count, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            call()
        seconds.append((time.perf_counter() - start) / count)
    return min(seconds)

numbers = torch.zeros(8)
layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))
batch = torch.randn(4, 64, 256)

def step():
    model(batch).sum().backward()
    dist.all_reduce(numbers)

print(best(lambda: dist.all_reduce(numbers), 2000, 10), best(step, 1, 20))
dist.destroy_process_group()
"""


def seconds(recorded: bool) -> tuple[float, float]:
    """Run the program once; returns seconds a collective and seconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        if recorded:
            env |= {"HMR_RECORD": folder, "PYTHONPATH": str(SITE)}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
        if recorded and not list(Path(folder).glob("events/*.wit")):
            raise SystemExit("nothing was recorded")
    call, step = map(float, done.stdout.split())
    return call, step


def fastest(rounds: list[tuple[float, float]]) -> tuple[float, float]:
    """The fastest collective and the fastest step of all rounds."""
    return min(call for call, _ in rounds), min(step for _, step in rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plain, recorded = [], []
    for _ in range(args.rounds):
        plain.append(seconds(recorded=False))
        recorded.append(seconds(recorded=True))
    call, step = fastest(plain)
    call_recorded, step_recorded = fastest(recorded)
    added_us, share = (call_recorded - call) * 1e6, step_recorded / step - 1
    verdict = mark(share, MOST_SHARE, at_most=True)
    print(f"a collective: {call * 1e6:.1f} us, recorded {call_recorded * 1e6:.1f} us: {added_us:.1f} us more")
    print(f"a step: {step * 1e3:.2f} ms, recorded {step_recorded * 1e3:.2f} ms: {share:+.2%} {verdict}")
    if args.json:
        rows = [
            {"recorded": False, "collective_us": call * 1e6, "step_ms": step * 1e3},
            {"recorded": True, "collective_us": call_recorded * 1e6, "step_ms": step_recorded * 1e3},
        ]
        write(
            args.json,
            {"hardware": cpu(), "versions": versions(), "commit": commit(), "rounds": args.rounds, "rows": rows},
        )
    return int(share > MOST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
