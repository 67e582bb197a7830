"""Programs of eight ranks in each kind of parallelism, with a fault, as a user would have written them.

    python parallel_jobs.py KIND [--ranks 8] [--fault]

The process imports torch once and forks the ranks. The fault is that of the rank FAULTY, in step 6 of 8.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

STEPS, FAULT_STEP, FAULTY = 8, 6, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model(num_layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(num_layers)])


def ddp(rank: int, size: int, faulty) -> None:
    """One rank leaves out the backward pass of a batch whose loss is not finite, and goes on to the metrics."""
    metrics = dist.new_group(group_desc="metrics")
    wrapped = nn.parallel.DistributedDataParallel(model())
    for step in range(STEPS):
        loss = wrapped(torch.ones(4, 16)).sum()
        if not faulty(step):
            loss.backward()
        dist.all_reduce(loss.detach(), group=metrics)


def fsdp(rank: int, size: int, faulty) -> None:
    """One rank runs a block once more, to log its activations."""
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    for block in sharded:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for step in range(STEPS):
        sharded(torch.ones(4, 16)).sum().backward()
        if faulty(step):
            with torch.no_grad():
                sharded(torch.ones(4, 16))
        dist.all_reduce(torch.ones(1))


def pipeline(rank: int, size: int, faulty) -> None:
    """One stage leaves out a batch that it cannot read, and goes on to the metrics."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    metrics = dist.new_group(group_desc="metrics")
    stage = PipelineStage(Block(), rank, size, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda out, target: (out - target).sum())
    for step in range(STEPS):
        if not faulty(step):
            inputs = (torch.ones(4, 16),) if rank == 0 else ()
            schedule.step(*inputs, target=torch.ones(4, 16) if rank == size - 1 else None)
        dist.all_reduce(torch.ones(1), group=metrics)


def async_tensor_parallel(rank: int, size: int, faulty) -> None:
    """Sequence parallelism by DTensor, whose gathers are asynchronous; one rank leaves out a block."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    }
    blocks = model()
    for block in blocks:
        parallelize_module(block, mesh, plan)
    for step in range(STEPS):
        x = torch.ones(16 // size * size // size, 16)
        for index, block in enumerate(blocks):
            if not (faulty(step) and index == 1):
                x = block(x)
        dist.barrier()


def functional(rank: int, size: int, faulty) -> None:
    """Functional collectives whose results are waited for where they are used; one rank leaves out the second."""
    import torch.distributed._functional_collectives as collectives

    group = dist.new_group(group_desc="tp")
    for step in range(STEPS):
        gathered = collectives.all_gather_tensor(torch.ones(2, 4), 0, group)
        other = torch.ones(3).sum()  # runs beside the gather
        summed = gathered.sum() + other
        if not faulty(step):
            summed = collectives.all_reduce(summed, "sum", group)
        float(summed)
        dist.barrier()


def mesh(rank: int, size: int, faulty) -> None:
    """A mesh of 2 x 4; one rank leaves out the average over its dp pair."""
    grid = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "ep"))
    dp, ep = grid.get_group("dp"), grid.get_group("ep")
    for step in range(STEPS):
        dist.all_reduce(torch.ones(4), group=ep)
        if not faulty(step):
            dist.all_reduce(torch.ones(4), group=dp)
        dist.barrier()


KINDS = {kind.__name__: kind for kind in (ddp, fsdp, pipeline, async_tensor_parallel, functional, mesh)}


def run(kind: str, rank: int, size: int, path: str, fault: bool) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    KINDS[kind](rank, size, lambda step: fault and rank == FAULTY and step == FAULT_STEP)
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--fault", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            get_context("fork").Process(
                target=run, args=(args.kind, rank, args.ranks, f"{folder}/store", args.fault), daemon=True
            )
            for rank in range(args.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(240)
        return max(abs(process.exitcode or 0) if process.exitcode is not None else 1 for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
