"""Programs of torch.distributed with a fault, in the form in which a user would write them. They import nothing of
ours.

    torchrun --nproc-per-node N recorded_jobs.py KIND [--fault]

Rank 1 makes the fault in step 6 of 8, unless the kind says otherwise.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

STEPS, FAULT_STEP = 8, 6
FAULT = "--fault" in sys.argv


def faulty(step: int) -> bool:
    return FAULT and dist.get_rank() == 1 and step == FAULT_STEP


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def ddp() -> None:
    """One rank has no batch and skips a step, as with uneven data."""
    wrapped = nn.parallel.DistributedDataParallel(model())
    for step in range(STEPS):
        if faulty(step):
            continue
        wrapped(torch.ones(4, 16)).sum().backward()
        dist.all_reduce(torch.ones(1))  # the mean of the loss


def ddp_straggler() -> None:
    """One rank computes for a long time before its step."""
    wrapped = nn.parallel.DistributedDataParallel(model())
    for step in range(STEPS):
        if faulty(step):
            until = time.monotonic() + 25
            while time.monotonic() < until:
                sum(range(1000))
        wrapped(torch.ones(4, 16)).sum().backward()


def fsdp() -> None:
    """One rank runs its model once more than the others, for an evaluation of its own."""
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for step in range(STEPS):
        sharded(torch.ones(4, 16)).sum().backward()
        if faulty(step):
            with torch.no_grad():
                sharded(torch.ones(4, 16))
        dist.all_reduce(torch.ones(1))


def pipeline() -> None:
    """One stage stops after fewer steps than the others."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, size = dist.get_rank(), dist.get_world_size()
    stage = PipelineStage(nn.Linear(16, 16), rank, size, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda out, target: (out - target).sum())
    for step in range(STEPS):
        if faulty(step):
            time.sleep(40)
        if rank == 0:
            schedule.step(torch.ones(4, 16))
        elif rank == size - 1:
            schedule.step(target=torch.ones(4, 16))
        else:
            schedule.step()


def tensor_parallel() -> None:
    """Functional collectives of DTensor; one rank leaves out a layer."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    sharded = parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for step in range(STEPS):
        if faulty(step):
            continue
        out = sharded(torch.ones(4, 16))
        float(out.sum().detach())
        dist.barrier()


def mesh() -> None:
    """Two groups for each rank. Two ranks enter them in the other order: a cycle through four ranks."""
    grid = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "ep"))
    dp, ep = grid.get_group("dp"), grid.get_group("ep")
    for step in range(STEPS):
        crossed = FAULT and step == FAULT_STEP and dist.get_rank() in (1, dist.get_world_size() // 2)
        for group in (ep, dp) if crossed else (dp, ep):
            dist.all_reduce(torch.ones(4), group=group)


def compiled() -> None:
    """A compiled model with a collective in its graph; one rank skips a step."""
    import torch.distributed._functional_collectives as functional

    @torch.compile(backend="aot_eager")
    def step_of(x: torch.Tensor) -> torch.Tensor:
        return functional.all_reduce(x * 2, "sum", dist.group.WORLD) + 1

    for step in range(STEPS):
        if faulty(step):
            continue
        step_of(torch.ones(8))
        dist.barrier()
    # in one piece, because the ranks share the pipe
    print(f"graphs {torch._dynamo.utils.counters['stats']['unique_graphs']}\n", end="")


def compiled_ddp() -> None:
    """A compiled DDP wrapper. torch.compile begins graphs only in code that is not torch's own."""
    wrapped = torch.compile(nn.parallel.DistributedDataParallel(model()), backend="aot_eager")
    for _ in range(STEPS):
        wrapped(torch.ones(4, 16)).sum().backward()
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    print(f"graphs {counters['stats']['unique_graphs']} breaks {breaks}\n", end="", flush=True)


def lock() -> None:
    """One rank waits for a lock. Another rank holds the lock and waits for the first rank in a collective."""
    import fcntl

    path = os.environ["LOCK_FILE"]
    for step in range(STEPS):
        dist.all_reduce(torch.ones(1))
        if FAULT and step == FAULT_STEP:
            with open(path, "w") as file:
                if dist.get_rank() == 0:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    with open(f"{path}.held", "w"):
                        dist.barrier()
                else:
                    while not os.path.exists(f"{path}.held"):
                        time.sleep(0.01)
                    fcntl.flock(file, fcntl.LOCK_EX)
                    dist.barrier()


def fails() -> None:
    """One rank ends with an exception."""
    for step in range(STEPS):
        if faulty(step):
            raise ValueError("the batch of rank 1 is empty")
        dist.all_reduce(torch.ones(1))


KINDS = {
    kind.__name__: kind
    for kind in (ddp, ddp_straggler, fsdp, pipeline, tensor_parallel, mesh, compiled, compiled_ddp, lock, fails)
}  # fmt: skip

if __name__ == "__main__":
    dist.init_process_group("gloo")
    KINDS[sys.argv[1]]()
    dist.destroy_process_group()
