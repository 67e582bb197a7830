"""Expert parallelism computes what one process computes, however uneven the ranks are."""

from __future__ import annotations

import random

import pytest
import torch
from ranks import run_ranks

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.config import ConfigError, ParallelConfig, preset
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import Collective, NullObserver
from hybrid_moe_ref.parallel.sharding.expert import apply_expert_parallel

RANKS = 8
SIZES = {
    "even": (3,) * RANKS,
    "uneven": (1, 7, 2, 11, 1, 4, 9, 3),
    "some zero": (0, 5, 0, 2, 1, 0, 8, 0),
    "all zero": (0,) * RANKS,
    "one rank only": (0, 0, 0, 6, 0, 0, 0, 0),
}


def connect(rank, store, observer=None):
    return Communicator.connect(ParallelConfig(dp_size=RANKS), rank, store=store, observer=observer, timeout_s=30)


def rows_of(rank, sizes):
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(sizes[rank], 6, generator=generator)
    ids = torch.randint(0, 512, (sizes[rank], 3), generator=generator, dtype=torch.int64)
    return x, ids, x[:, 0].to(torch.bfloat16)


def test_all_gather_v_and_reduce_scatter_v_with_uneven_and_zero_sizes(tmp_path):
    def run(rank, store):
        comm = connect(rank, store)
        for name, sizes in SIZES.items():
            gathered = comm.all_gather_v("ep", rows_of(rank, sizes), sizes)
            wanted = [torch.cat(parts) for parts in zip(*(rows_of(r, sizes) for r in range(RANKS)), strict=True)]
            for ours, theirs in zip(gathered, wanted, strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name

            generator = torch.Generator().manual_seed(7)
            partials = torch.randn(RANKS, sum(sizes), 6, generator=generator)
            mine = comm.reduce_scatter_v("ep", partials[rank], sizes)
            torch.testing.assert_close(mine, partials.sum(0).split(sizes)[rank], msg=name)

    run_ranks(RANKS, tmp_path, run)


def test_fp8_rows_cross_gloo_as_bytes(tmp_path):
    def run(rank, store):
        comm = connect(rank, store)
        rows = torch.full((2, 4), float(rank)).to(torch.float8_e4m3fn)
        (gathered,) = comm.all_gather_v("ep", [rows], (2,) * RANKS)
        assert gathered.dtype == torch.float8_e4m3fn
        assert gathered.float()[:, 0].tolist() == [r for r in map(float, range(RANKS)) for _ in range(2)]

    run_ranks(RANKS, tmp_path, run)


def test_rows_that_contradict_the_agreed_sizes_are_refused_before_anything_is_sent(tmp_path):
    def run(rank, store):
        comm = connect(rank, store)
        with pytest.raises(
            ValueError, match=r"ep all_gather_v at layers.0.moe: this rank has 3 rows, but the agreed size is 2"
        ):
            comm.all_gather_v("ep", [torch.zeros(3, 4)], (2,) * RANKS, layer="layers.0.moe")
        with pytest.raises(ValueError, match=r"this rank has 3 rows, but the agreed sizes add up to 16"):
            comm.reduce_scatter_v("ep", torch.zeros(3, 4), (2,) * RANKS)

    run_ranks(RANKS, tmp_path, run)


def test_the_observer_hears_of_every_collective_before_and_after(tmp_path):
    class Listener(NullObserver):
        def __init__(self):
            self.heard = []

        def groups(self, members):
            self.heard.append(dict(members))

        def enter(self, collective):
            self.heard.append(("enter", collective))

        def leave(self, collective):
            self.heard.append(("leave", collective))

    def run(rank, store):
        listener = Listener()
        comm = connect(rank, store, listener)
        comm.all_reduce("dp", torch.ones(4, dtype=torch.int32), "max", layer="step")
        return listener.heard

    event = Collective("dp", "all_reduce", "step", (4,), "int32", "max")
    everyone = tuple(range(RANKS))
    for heard in run_ranks(RANKS, tmp_path, run):
        assert heard == [{"dp": everyone, "ep": everyone}, ("enter", event), ("leave", event)]


@pytest.mark.parametrize("name", ["some zero", pytest.param("uneven", marks=pytest.mark.full)])
def test_dp8_ep8_equals_the_single_process_in_float32(tmp_path, name):
    config, seed = preset("tiny"), 3
    draw = random.Random(seed)
    tokens = [[draw.randrange(config.vocab_size) for _ in range(size)] for size in SIZES[name]]

    def run(rank, store):
        comm = connect(rank, store)
        model = HybridMoE(config, device="meta")
        context = apply_expert_parallel(model, comm)
        model.init_weights(seed)
        num_experts = {block.mlp.experts.gate_up_proj.shape[0] for block in model.model.layers}
        assert num_experts == {512 // RANKS}
        context.sizes = SIZES[name]
        mine = tokens[rank]
        batch = Batch.dummy(len(mine)) if mine else Batch((), 0, torch.zeros(0, dtype=torch.long))
        return model.logits(model.step(torch.tensor(mine, dtype=torch.long), batch))

    single = HybridMoE(config, device="meta").init_weights(seed)
    for rank, logits in enumerate(run_ranks(RANKS, tmp_path, run)):
        assert logits.shape == (SIZES[name][rank], config.vocab_size)
        if tokens[rank]:
            wanted = single(torch.tensor([tokens[rank]]))[0]
            worst = ((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
            assert worst <= 1e-5, f"rank {rank}, sizes {name}, seed {seed}: relative error {worst:.1e}"


def test_experts_that_do_not_divide_over_the_ranks_are_refused():
    class SevenRanks:
        def members(self, group):
            return tuple(range(7))

    with pytest.raises(ConfigError, match="512 experts cannot be divided evenly over 7 ranks"):
        apply_expert_parallel(HybridMoE(preset("tiny"), device="meta"), SevenRanks())
