#!/usr/bin/env python3
"""A hybrid (Gated DeltaNet + MoE) server under expert parallelism hangs when one data-parallel rank has no requests.

    torchrun --nproc-per-node 8 ep_deadlock.py         hangs; after 5 s prints which ranks wait where, and exits with 1
    torchrun --nproc-per-node 8 ep_deadlock.py --fix   finishes the same requests, and exits with 0

The program runs on 2 to 8 ranks, with NCCL if each rank has a GPU, else with gloo on the CPU. It needs only torch.

In each step, all ranks agree on their token counts with an all-reduce over the data-parallel CPU group. Then every
layer runs Gated DeltaNet (GDN, without communication) and an MoE, whose tokens are all-gathered to the experts' ranks
and reduce-scattered back. A rank without requests runs a dummy batch of one token, so that it takes part in all
collectives.

THE FAULT  A rank with requests prepares GDN state, and for this builds the step's metadata again, by one more
           all-reduce. As long as all ranks have requests, all ranks issue this all-reduce. The first rank without
           requests has no state to prepare. This rank goes on to the all-gather and waits there for the other ranks,
           which wait for it in the all-reduce.
THE CURE   The ranks agree once per step. A layer that needs the metadata again gets the result of this agreement.

This file shows that the fault (ROCm/ATOM pull request 1690) causes a hang without an error, and in which collectives
the ranks then wait. It also shows that with the cure the ranks finish the same requests with the right numbers. It does
not show that this fault caused the hang of any other server, and it shows nothing about speed.
"""

import argparse
import faulthandler
import os
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

# torch 2.13 renamed these two functions and warns about the old names.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

HIDDEN, HEADS, LAYERS, EXPERTS_PER_RANK, TOP_K = 64, 4, 2, 16, 4
parser = argparse.ArgumentParser()
parser.add_argument("--fix", action="store_true", help="agree once per step")
parser.add_argument(
    "--quiet", type=float, default=5.0, help="seconds without progress on any rank that count as a hang"
)
parser.add_argument("--deadline", type=float, default=30.0, help="seconds after which the run ends in any case")
args = parser.parse_args()

rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if not 2 <= world <= 8:
    sys.exit("ep_deadlock: start it with torchrun --nproc-per-node 2 (up to 8)")
faulthandler.dump_traceback_later(args.deadline, exit=True)
on_gpu = torch.cuda.device_count() >= world
device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
else:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)

store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=args.deadline)))
dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
dp = dist.new_group(backend="gloo")  # agreements: small, on the CPU
positions = dist.PrefixStore("position", store)
moved = time.monotonic()


def at(where):
    """Write into the store, for all ranks, in which collective this rank is about to wait."""
    global moved
    positions.set(str(rank), where)
    moved = time.monotonic()


def watch():
    """Watch all ranks. If no rank moves for --quiet seconds, rank 0 prints where each rank waits, and all ranks end."""
    seen, since = None, time.monotonic()
    while True:
        time.sleep(0.25)
        if time.monotonic() - moved < 1 or not positions.check([str(other) for other in range(world)]):
            seen = None
            continue
        now = [positions.get(str(other)).decode() for other in range(world)]
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > args.quiet and "done" not in now:
            if rank == 0:
                together = {where: [r for r in range(world) if now[r] == where] for where in dict.fromkeys(now)}
                lines = [f"  ranks {ranks} wait in {where}" for where, ranks in together.items()]
                print(f"HANG: no rank has moved for {args.quiet:g} s\n" + "\n".join(lines), flush=True)
            time.sleep(1)  # the other ranks must also be able to read all positions before this rank ends
            os._exit(1)


def agree(num_tokens, who):
    """Agree on the step's metadata by one all-reduce. Returns a list of the number of tokens of every rank.

    num_tokens: the number of tokens of this rank
    who: the step and the layer, for the text about a hang
    """
    tokens = torch.zeros(world, dtype=torch.int32)
    tokens[rank] = num_tokens
    at(f"dp all_reduce ({who})")
    dist.all_reduce(tokens, group=dp)
    return tokens.tolist()


class GatedDeltaNet(torch.nn.Module):
    """One decode step of the gated delta rule on each request's own state."""

    def __init__(self):
        super().__init__()
        self.qkv, self.gates = torch.nn.Linear(HIDDEN, 3 * HIDDEN), torch.nn.Linear(HIDDEN, 2 * HEADS)

    def forward(self, x, state):
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        decay, beta = self.gates(x).sigmoid().chunk(2, dim=-1)
        state.mul_(decay[..., None, None])
        delta = beta[..., None] * (v - torch.einsum("nhk,nhkv->nhv", k, state))
        state.add_(k[..., None] * delta[..., None, :])
        return x + torch.einsum("nhk,nhkv->nhv", q, state).flatten(1)


class MoE(torch.nn.Module):
    """A mixture-of-experts layer: each rank has some of the experts, and computes them for the tokens of all ranks."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(HIDDEN, world * EXPERTS_PER_RANK)
        self.experts = torch.nn.Parameter(torch.randn(world * EXPERTS_PER_RANK, HIDDEN, HIDDEN) / HIDDEN**0.5)

    def partial(self, x, first, last):
        """Return what the experts first to last-1 contribute to the output of each token."""
        weights, chosen = self.router(x).softmax(-1).topk(TOP_K)
        y = torch.zeros_like(x)
        for expert in range(first, last):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            y.index_add_(0, token, F.silu(x[token] @ self.experts[expert]) * weights[token, slot, None])
        return y

    def forward(self, x, where):
        everyone = x.new_empty(world * len(x), HIDDEN)
        at(f"ep all_gather ({where})")
        all_gather(everyone, x)
        mine = self.partial(everyone, rank * EXPERTS_PER_RANK, (rank + 1) * EXPERTS_PER_RANK)
        y = torch.empty_like(x)
        at(f"ep reduce_scatter ({where})")
        reduce_scatter(y, mine)
        if not torch.allclose(y, self.partial(x, 0, world * EXPERTS_PER_RANK), rtol=1e-4, atol=1e-5):
            sys.exit(f"rank {rank}: {where} differs from the single-process result")
        return x + y


torch.manual_seed(0)
layers = [(GatedDeltaNet().to(device), MoE().to(device)) for _ in range(LAYERS)]
states = [torch.zeros(1, HEADS, HIDDEN // HEADS, HIDDEN // HEADS, device=device) for _ in range(LAYERS)]
steps_with_requests = 4 + 2 * (world - 1 - rank)  # the last rank is the first to have none left
last_step = 4 + 2 * (world - 1)
threading.Thread(target=watch, daemon=True).start()
with torch.no_grad():
    for step in range(last_step):
        live = step < steps_with_requests
        x = torch.randn(1, HIDDEN, device=device) if live else torch.zeros(1, HIDDEN, device=device)
        metadata = agree(1, f"step {step}, before the model")
        for index, (delta_net, moe) in enumerate(layers):
            if live and index == 0 and not args.fix:
                metadata = agree(1, f"step {step}, layer {index} gated_delta_net")  # THE FAULT: idle ranks issue none
            assert metadata == [1] * world
            x = moe(delta_net(x, states[index]), f"step {step}, layer {index} moe")
at("done")
dist.barrier(group=dp)
if rank == 0:
    print(
        f"PASSED: {last_step} steps on {world} ranks, every MoE output equal to the single-process result", flush=True
    )
dist.destroy_process_group()
