"""Mixers agree with code that others wrote: transformers' Mamba-2, the plain recurrences of fla and mamba-ssm."""

import importlib.util
import random
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hybrid_moe_kernels import gated_delta_rule, ssd
from hybrid_moe_kernels.gated_delta_rule.reference import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hybrid_moe_kernels.ssd.reference import chunk_ssd, recurrent_ssd

from hybrid_moe_ref import Batch, HybridCache, ModelConfig
from hybrid_moe_ref.commands.comparison import LIMIT, float64_throughout
from hybrid_moe_ref.layers.mamba2 import Mamba2
from hybrid_moe_ref.model.weights import init_weights

NUM_CONFIGS = 12
SEEDS = [pytest.param(seed, marks=pytest.mark.full if seed else ()) for seed in range(NUM_CONFIGS)]
"""Of each family twelve configurations are compared, the first also by the default suite."""


@pytest.fixture(scope="module")
def transformers():
    # transformers prefers fla where it can be imported, and fla without a GPU fails at the first call.
    sys.modules.setdefault("fla", None)
    return pytest.importorskip("transformers")


def draw_mamba(seed: int) -> ModelConfig:
    r = random.Random(seed)
    groups = r.choice([1, 2, 4])
    return ModelConfig(
        layer_pattern="M",
        vocab_size=8,
        hidden_size=48,
        mamba_num_heads=groups * r.choice([1, 2, 3]),
        mamba_head_dim=r.choice([4, 8, 16]),
        mamba_state_size=r.choice([8, 16, 24]),
        mamba_num_groups=groups,
        mamba_conv_kernel_dim=r.choice([2, 3, 4]),
        mamba_conv_bias=r.random() < 0.5,
        mamba_time_step_min=r.choice([0.0, 0.01]),
        rms_norm_eps=r.choice([1e-6, 1e-5]),
        mamba_time_step_max=r.choice([None, 0.02, 0.5]),
    )


def nemotron_mixer(config: ModelConfig):
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    theirs = NemotronHConfig(
        hidden_size=config.hidden_size,
        mamba_num_heads=config.mamba_num_heads,
        mamba_head_dim=config.mamba_head_dim,
        ssm_state_size=config.mamba_state_size,
        n_groups=config.mamba_num_groups,
        conv_kernel=config.mamba_conv_kernel_dim,
        use_conv_bias=config.mamba_conv_bias,
        time_step_min=config.mamba_time_step_min,
        layer_norm_epsilon=config.rms_norm_eps,
        use_bias=False,
        chunk_size=32,
        hybrid_override_pattern="M",
        num_hidden_layers=1,
    )
    mixer = NemotronHMamba2Mixer(theirs, layer_idx=0)
    mixer.time_step_limit = time_step_limit(config)  # its config has no upper one
    return mixer, theirs


def time_step_limit(config: ModelConfig) -> tuple[float, float]:
    largest = config.mamba_time_step_max
    return config.mamba_time_step_min, float("inf") if largest is None else largest


def granite_mixer(config: ModelConfig):
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

    inner = config.mamba_num_heads * config.mamba_head_dim
    theirs = GraniteMoeHybridConfig(
        hidden_size=inner // 2,
        mamba_expand=2,
        mamba_n_heads=config.mamba_num_heads,
        mamba_d_head=config.mamba_head_dim,
        mamba_d_state=config.mamba_state_size,
        mamba_n_groups=config.mamba_num_groups,
        mamba_d_conv=config.mamba_conv_kernel_dim,
        mamba_conv_bias=config.mamba_conv_bias,
        time_step_limit=time_step_limit(config),
        rms_norm_eps=config.rms_norm_eps,
        mamba_proj_bias=False,
        mamba_chunk_size=32,
        num_hidden_layers=1,
        layer_types=["mamba"],
    )
    return GraniteMoeHybridMambaLayer(theirs, layer_idx=0), theirs


@pytest.mark.parametrize("make", [nemotron_mixer, granite_mixer])
@pytest.mark.parametrize("seed", SEEDS)
def test_mamba2_equals_transformers_mixers(transformers, make, seed: int) -> None:
    config = draw_mamba(seed)
    if make is granite_mixer:  # it ties the hidden size to the inner one
        inner = config.mamba_num_heads * config.mamba_head_dim
        config = ModelConfig.from_mapping(config.to_mapping() | {"hidden_size": inner // 2})
    ours = Mamba2(config).double().requires_grad_(False)
    init_weights(torch.nn.ModuleDict({"mamba": ours}), seed)
    theirs, their_config = make(config)
    theirs.double().eval().load_state_dict(ours.state_dict(), strict=True)
    T = random.Random(seed).choice([1, 2, 31, 64, 65, 100])
    x = torch.randn(2, T, config.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad(), float64_throughout(theirs):
        want = theirs(x)
    got = ours(x.flatten(0, 1), Batch.dense(2, T)).view_as(x)
    error = (got - want).norm() / want.norm()
    assert error <= LIMIT, f"seed {seed}, {T} tokens: relative error {error:.1e}"

    # Prefill, a chunk behind it, and single tokens, for which theirs forgets the limits of the time step.
    counts = [21, 7, 2] + ([1] * 3 if time_step_limit(config) == (0, float("inf")) else [])
    shape = 2, sum(counts), config.hidden_size
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cache, their_cache = HybridCache(config, 2, dtype=torch.float64), transformers.DynamicCache(config=their_config)
    sequences = [cache.allocate() for _ in range(2)]
    for part in x.split(counts, dim=1):
        with torch.no_grad(), float64_throughout(theirs):
            want = theirs(part, cache_params=their_cache)
        batch = Batch.of([(sequence, part.shape[1]) for sequence in sequences])
        got = ours(part.flatten(0, 1), batch, cache.begin(batch)[0]).view_as(part)
        cache.commit(batch)
        error = (got - want).norm() / want.norm()
        assert error <= LIMIT, f"seed {seed}, {part.shape[1]} cached tokens: relative error {error:.1e}"


ORACLES = Path(sys.prefix, "oracles")
"""Where set-up puts the packages that nothing but these tests may see: transformers changes with fla in sight."""


def load_file(package: str, file: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """One file of an oracle, without the package around it, whose import needs a GPU."""
    for folder in (ORACLES, *map(Path, sys.path)):
        if (folder / package / file).is_file():
            break
    else:
        pytest.skip(f"{package} is not installed")
    with monkeypatch.context() as context:
        context.syspath_prepend(str(folder))
        pytest.importorskip("einops")
    spec = importlib.util.spec_from_file_location(f"oracle_{package}", folder / package / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(4))
def test_gated_delta_rule_equals_fla(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    naive = load_file("fla", "ops/gated_delta_rule/naive.py", monkeypatch)
    draw, r = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T, H, K, V = (
        2,
        draw.choice([1, 33, 100, 150]),
        draw.choice([1, 3, 4]),
        draw.choice([8, 16]),
        draw.choice([8, 24]),
    )
    raw_q, raw_k = (torch.randn(B, T, H, K, generator=r) for _ in range(2))
    v, state = torch.randn(B, T, H, V, generator=r), torch.randn(B, H, K, V, generator=r)
    g, beta = -torch.rand(B, T, H, generator=r), torch.rand(B, T, H, generator=r)
    q, k = F.normalize(raw_q, dim=-1) * K**-0.5, F.normalize(raw_k, dim=-1)
    want, end = naive.naive_recurrent_gated_delta_rule(
        q, k, v, beta, g, scale=1.0, initial_state=state, output_final_state=True
    )
    answers = [rule(q, k, v, g, beta, state) for rule in (recurrent_gated_delta_rule, chunk_gated_delta_rule)]
    # And the operation that the layer calls, which also scales q and k, on rows of sequences one after another.
    rows, pool = [x.flatten(0, 1) for x in (raw_q, raw_k, v, g, beta)], state.clone()
    o_THV = gated_delta_rule.prefill(*rows, pool, torch.arange(B), torch.arange(B + 1) * T)
    for o, final in [*answers, (o_THV.view_as(v), pool)]:
        torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(final, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_ssd_equals_mamba_ssm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file imports a kernel that only its own self-test calls, and that would need Triton and a GPU.
    unused = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    unused.mamba_chunk_scan_combined = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, unused.__name__, unused)
    minimal = load_file("mamba_ssm", "modules/ssd_minimal.py", monkeypatch)
    draw, r = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T, H, P, N = 2, 32 * draw.randint(1, 4), draw.choice([1, 3, 4]), draw.choice([8, 16]), draw.choice([8, 16])
    x, dt = torch.randn(B, T, H, P, generator=r), torch.rand(B, T, H, generator=r)
    A, D = -torch.rand(H, generator=r), torch.zeros(H)
    b, c = (torch.randn(B, T, H, N, generator=r) for _ in range(2))
    state = torch.randn(B, H, P, N, generator=r)
    want, end = minimal.ssd_minimal_discrete(
        x * dt[..., None], A * dt, b, c, block_len=32, initial_states=state[:, None]
    )
    answers = [scan(x, dt, A, b, c, D, state) for scan in (recurrent_ssd, chunk_ssd)]
    (x, dt, b, c), pool = (z.flatten(0, 1) for z in (x, dt, b, c)), state.clone()
    y_THP = ssd.prefill(x, dt, A, b, c, D, pool, torch.arange(B), torch.arange(B + 1) * T)
    for y, final in [*answers, (y_THP.view_as(want), pool)]:
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(final, end, rtol=1e-4, atol=1e-4)
