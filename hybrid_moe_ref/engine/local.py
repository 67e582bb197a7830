"""Run a whole server on this machine for one prompt. The ranks are forked processes, which connect through a file.

Rank 0 has the request and prints the text. The other ranks of rank 0's tp group run the same request; all
ranks outside this group run dummy batches.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.scheduler import Request
from hybrid_moe_ref.parallel.checks.store import loopback_store
from hybrid_moe_ref.parallel.comm import Communicator


def generate(
    server: ServerConfig, request: Request, device: str, on_token: Callable[[int], None], on_end: Callable[[], None]
) -> None:
    """Serve one request on forked ranks.

    Call this before the process uses CUDA. If a rank fails, this function ends the other ranks, and raises
    ChildProcessError with the error of the rank that failed first.

    device     "cpu" or "cuda"; if there are fewer GPUs than ranks, the ranks share GPUs
    on_token   called in rank 0's process with each new token
    on_end     called in rank 0's process after the last token
    """
    if device == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (server, request, device, on_token, on_end, str(Path(folder) / "store"))
        try:
            multiprocessing.start_processes(
                _run_rank, args=arguments, nprocs=server.parallel.world_size, start_method="fork"
            )
        except multiprocessing.ProcessRaisedException as error:
            last_line = error.msg.strip().splitlines()[-1]
            raise ChildProcessError(f"rank {error.error_index}: {last_line}") from None
        except multiprocessing.ProcessExitedException as error:
            raise ChildProcessError(f"rank {error.error_index} ended: {error.msg}") from None


def _run_rank(
    rank: int,
    server: ServerConfig,
    request: Request,
    device: str,
    on_token: Callable[[int], None],
    on_end: Callable[[], None],
    store_path: str,
) -> None:
    torch.set_num_threads(1)
    on_gpu = device != "cpu"
    num_ranks = server.parallel.world_size
    meeting: dist.Store = dist.FileStore(store_path, num_ranks)
    store = loopback_store(meeting, rank, num_ranks) if server.checks == "strict" else meeting
    comm = Communicator.connect(
        server.parallel,
        rank,
        backend="nccl" if on_gpu and torch.cuda.device_count() >= num_ranks else "gloo",
        store=store,
        device=torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else "cpu",
    )
    engine = Engine(server, comm)
    has_request = rank < server.parallel.tp_size
    engine.serve([request] if has_request else [], on_token=(lambda _, token: on_token(token)) if rank == 0 else None)
    if rank == 0:
        on_end()
    comm.close()
    meeting.set(f"left/{rank}", "")
    if rank == 0:  # the other ranks may still use a store that runs in rank 0's process
        meeting.wait([f"left/{other}" for other in range(num_ranks)])
