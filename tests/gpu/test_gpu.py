"""What needs a CUDA device; skipped without one. Ranks fork before CUDA is touched, which this process never does: no
test module may ask for a device when it is imported, not even whether there is one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.config import EngineConfig, ParallelConfig, preset
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.scheduler import Request
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.sharding.expert import apply_expert_parallel
from repro.lab.outcome import reference
from repro.lab.settings import RunSettings

NUM_GPUS = len(list(Path("/dev").glob("nvidia[0-9]*")))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device")]


def expert_parallel_logits(num_ranks, tmp_path, backend, sizes):
    """Logits of every rank's own tokens, with rank r on GPU r modulo their number."""
    config = preset("tiny")

    def run(rank, store):
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        parallel = ParallelConfig(dp_size=num_ranks)
        comm = Communicator.connect(parallel, rank, backend=backend, store=store, device=device, timeout_s=120)
        model = HybridMoE(config, device="meta", dtype=torch.float64)
        context = apply_expert_parallel(model, comm)
        model.init_weights(0, device=device)
        context.sizes = sizes
        tokens_N = torch.arange(sizes[rank], device=device) + 10 * rank
        batch = Batch.dense(1, sizes[rank], device) if sizes[rank] else Batch.of([], device)
        return model.logits(model.step(tokens_N, batch)).cpu()

    return run_ranks(num_ranks, tmp_path, run, deadline_s=300)


def check_against_the_cpu(logits, sizes):
    single = HybridMoE(preset("tiny"), device="meta", dtype=torch.float64).init_weights(0)
    for rank, size in enumerate(sizes):
        if size:
            wanted = single(torch.arange(size)[None] + 10 * rank)[0]
            torch.testing.assert_close(logits[rank], wanted, rtol=1e-9, atol=1e-9, msg=f"rank {rank} of {sizes}")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_one_gpu_computes_what_the_cpu_computes(tmp_path, backend):
    check_against_the_cpu(expert_parallel_logits(1, tmp_path, backend, (7,)), (7,))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("sizes", [(3,) * 8, (1, 7, 2, 0, 1, 4, 9, 3)])
def test_eight_gloo_ranks_on_the_gpus_equal_the_cpu(tmp_path, sizes):
    check_against_the_cpu(expert_parallel_logits(8, tmp_path, "gloo", sizes), sizes)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("dtype", ["float64", "float32"])  # the second runs on the Triton kernels where they are
def test_eight_gloo_ranks_on_the_gpus_serve_what_the_cpu_serves(tmp_path, dtype):
    settings = RunSettings("metadata_rebuild", "control", seed=11)
    settings = dataclasses.replace(settings, engine=dataclasses.replace(settings.engine, dtype=dtype))

    def run(rank, store):
        server = settings.server()
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        comm = Communicator.connect(server.parallel, rank, store=store, device=device, timeout_s=120)
        return Engine(server, comm).serve(settings.requests()[rank])

    tokens = {
        name: output for outputs in run_ranks(8, tmp_path, run, deadline_s=300) for name, output in outputs.items()
    }
    wanted = reference.compute(settings)
    assert tokens.keys() == wanted.keys()
    same = sum(tokens[name] == wanted[name] for name in wanted)
    # In float32, two logits may be so near that the order of a sum decides.
    assert same >= len(wanted) * (1.0 if dtype == "float64" else 0.9), f"{same} of {len(wanted)}, seed {settings.seed}"


@pytest.mark.timeout(400)
@pytest.mark.skipif(NUM_GPUS < 2, reason="NCCL needs a GPU for each rank")
def test_nccl_ranks_equal_the_cpu(tmp_path):
    num_ranks = 1 << (min(NUM_GPUS, 8).bit_length() - 1)
    for sizes in ((3,) * num_ranks, tuple(range(num_ranks))):
        check_against_the_cpu(expert_parallel_logits(num_ranks, tmp_path, "nccl", sizes), sizes)


@pytest.mark.timeout(400)
@pytest.mark.skipif(NUM_GPUS < 2, reason="NCCL needs a GPU for each rank")
def test_the_scenario_hangs_and_runs_fixed_on_nccl(tmp_path):
    num_ranks = 1 << (min(NUM_GPUS, 8).bit_length() - 1)
    command = [sys.executable, "-m", "repro", "run", "metadata_rebuild", "--variant", "all", "--backend", "nccl"]
    run = subprocess.run([*command, "--ranks", str(num_ranks), "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_cuda_graphs_of_the_row_wise_modules_serve_the_tokens_of_an_eager_engine(tmp_path, backend):
    def run(rank, store):
        device = torch.device("cuda", 0)
        comm = Communicator.connect(ParallelConfig(), rank, backend=backend, store=store, device=device, timeout_s=120)
        served = []
        for mode in ("eager", "graphs"):
            sizes = EngineConfig(max_num_seqs=4, max_num_batched_tokens=48, dtype="float64", mode=mode)
            engine = Engine(ServerConfig(preset("tiny"), ParallelConfig(), sizes), comm)
            requests = [Request(f"{n}", tuple(range(1, 4 + n)), 6, arrival_step=n) for n in range(4)]
            served.append(engine.serve(requests))
        assert any(piece._graphs for piece in engine.runner.graphs._modules), "nothing was captured"
        return served

    ((eager, replayed),) = run_ranks(1, tmp_path, run, deadline_s=300)
    assert replayed == eager
