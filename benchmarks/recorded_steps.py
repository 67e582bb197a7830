"""What bench_record.py measures: one process with one program, which runs on request.

    python benchmarks/recorded_steps.py PROGRAM      then, on standard input, one of these in a line

COUNT        runs the program so many times, and prints the seconds
pairs COUNT  runs so many pairs of steps, of which one, drawn, is recorded; prints their relative differences as JSON
thread       runs recorded steps for THREAD_S, and prints the share of the time that the recorder's thread computes
             (before the first pairs, because the thread ends when it finds a step that is not recorded)

Each program is one rank of a job on torch's fake backend, where every collective returns at once: nobody waits, so the
hooks have nothing to hide behind. Only ``gloo`` and ``ddp`` use gloo, with one rank.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

RANKS = 8
THREAD_S = 2.0


def join(backend: str, size: int = RANKS) -> None:
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, rank=0, world_size=size, store=store)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def all_reduce() -> Callable[[], object]:
    join("fake")
    numbers = torch.zeros(8)
    return lambda: dist.all_reduce(numbers)


def gloo() -> Callable[[], object]:
    join("gloo", 1)
    numbers = torch.zeros(8)
    return lambda: dist.all_reduce(numbers)


def asynchronous() -> Callable[[], object]:
    join("fake")
    numbers = torch.zeros(8)
    return lambda: dist.all_reduce(numbers, async_op=True).wait()


def all_gather() -> Callable[[], object]:
    join("fake")
    numbers, gathered = torch.zeros(8), torch.zeros(8 * RANKS)
    return lambda: dist.all_gather_into_tensor(gathered, numbers)


def barrier() -> Callable[[], object]:
    join("fake")
    return dist.barrier


def ddp() -> Callable[[], object]:
    join("gloo", 1)  # DDP's reducer fails on the results of the fake backend
    model, batch, loss = nn.parallel.DistributedDataParallel(transformer()), torch.randn(4, 64, 256), torch.zeros(1)

    def step() -> None:
        model(batch).sum().backward()
        dist.all_reduce(loss)

    return step


def fsdp() -> Callable[[], object]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    join("fake")
    model, batch, loss = transformer(), torch.randn(4, 64, 256), torch.zeros(1)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def step() -> None:
        model(batch).sum().backward()
        dist.all_reduce(loss)

    return step


def experts() -> Callable[[], object]:
    """A step of a server with expert parallelism: four layers, each with a gather and a scatter, for 32 tokens."""
    join("fake")
    tokens, agreed = torch.randn(32 // RANKS, 512), torch.zeros(4, RANKS, dtype=torch.int32)
    layers = [(torch.randn(512, 2048) / 32, torch.randn(2048, 512) / 32) for _ in range(4)]

    @torch.no_grad()
    def step() -> None:
        dist.all_reduce(agreed)
        x = tokens
        for up, down in layers:
            gathered = torch.empty(32, 512)
            dist.all_gather_into_tensor(gathered, x)
            y = torch.relu(gathered @ up) @ down
            combined = torch.empty_like(x)
            dist.reduce_scatter_tensor(combined, y)
            x = x + combined

    return step


PROGRAMS = {
    program.__name__: program for program in (all_reduce, asynchronous, all_gather, barrier, gloo, ddp, fsdp, experts)
}


def differences(run: Callable[[], object], num_pairs: int) -> list[float]:
    """Return (recorded - not) / the mean of both for pairs of neighbouring runs.

    While a run is not recorded the hooks stay in place and return at once. The divisor is symmetric, because the mean
    of quotients of two noisy times is above 1.
    """
    from repro.attach.record import rank as this

    rank, draw = this.current, random.Random(num_pairs)
    assert rank is not None, "this process is not recorded"
    pairs = []
    for _ in range(num_pairs):
        seconds = {}
        for on in draw.sample((True, False), 2):
            this.use(rank if on else None)
            start = time.perf_counter()
            run()
            seconds[on] = time.perf_counter() - start
        pairs.append(2 * (seconds[True] - seconds[False]) / (seconds[True] + seconds[False]))
    this.use(rank)
    return pairs


def thread_share(run: Callable[[], object]) -> float:
    """Return the processor time of the recorder's background thread as a share of the wall time of recorded runs."""
    clock = next(time.pthread_getcpuclockid(at.ident or 0) for at in threading.enumerate() if at.name == "repro record")
    start, start_s = time.clock_gettime(clock), time.perf_counter()
    while time.perf_counter() < start_s + THREAD_S:
        run()
    return (time.clock_gettime(clock) - start) / (time.perf_counter() - start_s)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = PROGRAMS[sys.argv[1]]()
    for line in sys.stdin:
        *pairs, count = line.split()
        if count == "thread":
            print(thread_share(run), flush=True)
            continue
        if pairs:
            print(json.dumps(differences(run, int(count))), flush=True)
            continue
        start = time.perf_counter()
        for _ in range(int(count)):
            run()
        print(time.perf_counter() - start, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
