"""Gradients in plain torch: what backward gives equals finite differences, for each mixer, the MoE and the model."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from hybrid_moe_ref import Batch, HybridCache, HybridMoE, ModelConfig
from hybrid_moe_ref.layers.moe import MLP, MoE
from hybrid_moe_ref.model.block import MIXERS
from hybrid_moe_ref.model.weights import init_weights

CONFIG = ModelConfig(
    layer_pattern="GAM",
    vocab_size=13,
    hidden_size=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    partial_rotary_factor=0.5,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=3,
    linear_value_head_dim=2,
    mamba_num_heads=2,
    mamba_head_dim=2,
    mamba_state_size=3,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=3,
    shared_expert_intermediate_size=4,
)
NAMES = {"G": "linear_attn", "A": "self_attn", "M": "mamba"}


def drawn(module: nn.Module, name: str) -> nn.Module:
    """The module in float64, with weights as a model has them, and gradients wanted of all."""
    module = module.double()
    init_weights(nn.ModuleDict({name: module}), seed=2)
    return module.requires_grad_(True)


def rows(count: int) -> Tensor:
    x = torch.randn(count, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_(True)


def check_gradients(module: nn.Module, x_NH: Tensor, call) -> None:
    """Of the input and of every parameter."""
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x_NH: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), call(x_NH))

    assert torch.autograd.gradcheck(run, (x_NH, *values), fast_mode=True)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("lengths", [(1, 1), (3,), (2, 1, 4)], ids=str)
def test_gradients_of_a_mixer_equal_finite_differences(kind: str, lengths: tuple[int, ...]) -> None:
    mixer = drawn(MIXERS[kind](CONFIG), NAMES[kind])
    batch = Batch._build([(0, length, None) for length in lengths], None)
    check_gradients(mixer, rows(sum(lengths)), lambda x_NH: (x_NH, batch))


@pytest.mark.parametrize("num_rows", [1, 6])
def test_gradients_of_the_mixture_equal_finite_differences(num_rows: int) -> None:
    """Few rows and many are computed in different ways without a gradient."""
    check_gradients(drawn(MoE(CONFIG), "mlp"), rows(num_rows), lambda x_NH: (x_NH,))
    check_gradients(drawn(MLP(6, 4), "mlp"), rows(num_rows), lambda x_NH: (x_NH,))


def test_a_model_learns() -> None:
    model = HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(3).requires_grad_(True)
    tokens = torch.randint(CONFIG.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def test_one_trainable_parameter_gets_the_gradient_that_it_gets_among_all() -> None:
    """As with an adapter: what comes before it needs no gradient."""
    tokens = torch.randint(CONFIG.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    model = HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(3).requires_grad_(True)
    model(tokens).square().sum().backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        model.zero_grad()
        model.requires_grad_(False)
        parameter.requires_grad_(True)
        model(tokens).square().sum().backward()
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-12, atol=1e-12, msg=name)


def test_a_cached_step_has_the_values_and_no_gradient_of_the_past() -> None:
    config = dataclasses.replace(CONFIG, layer_pattern="GAMA")
    model = HybridMoE(config, device="meta", dtype=torch.float64).init_weights(3)
    tokens, cache = torch.arange(9) % config.vocab_size, HybridCache(config, 20, dtype=torch.float64)
    want = model(tokens[None])[0]
    model.requires_grad_(True)
    sequence, got = cache.allocate(), []
    for part in tokens.split([5, 3, 1]):
        got.append(model.logits(model.step(part, Batch.of([(sequence, len(part))]), cache)))
        got[-1].square().sum().backward()
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-12, atol=1e-12)
    assert not any(buffer.requires_grad for buffer in cache.buffers)
