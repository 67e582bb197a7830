"""The model does what its modules say: hooks see every call, and a module that is replaced or changed is called."""

import copy

import pytest
import torch
from test_model import SMALL as CONFIG
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from hybrid_moe_ref import Batch, HybridCache, HybridMoE

TOKENS = torch.randint(CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole() -> HybridMoE:
    return HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(5)


@pytest.fixture
def model(whole: HybridMoE) -> HybridMoE:
    return copy.deepcopy(whole)


def watched(model: HybridMoE) -> dict[str, nn.Module]:
    """What computes and has a name: linears, norms, routers, experts and what holds them; not the MTP layer."""
    return {
        name: module
        for name, module in model.named_modules()
        if not name.startswith("mtp") and not isinstance(module, nn.ModuleList) and name not in ("", "model")
    }


def one_of_each(model: HybridMoE) -> dict[str, nn.Module]:
    """Of the modules with the same name in several layers the last one."""
    last = {name.split(".", 3)[-1]: name for name in watched(model)}
    return {name: model.get_submodule(name) for name in last.values()}


def steps(model: HybridMoE) -> list[Tensor]:
    """Logits of a prefill and of a decode step."""
    cache = HybridCache(CONFIG, 40, dtype=torch.float64)
    sequences = [cache.allocate() for _ in TOKENS]
    prompts, last = TOKENS[:, :-1].flatten(), TOKENS[:, -1]
    return [
        model.logits(model.step(tokens, Batch.of([(sequence, count) for sequence in sequences]), cache))
        for tokens, count in ((prompts, TOKENS.shape[1] - 1), (last, 1))
    ]


REGISTER = {
    "forward": lambda module, hook: module.register_forward_hook(lambda *args: hook()),
    "pre": lambda module, hook: module.register_forward_pre_hook(lambda *args: hook()),
    "always": lambda module, hook: module.register_forward_hook(lambda *args: hook(), always_call=True),
    "keywords": lambda module, hook: module.register_forward_hook(lambda *args: hook(), with_kwargs=True),
}


@pytest.mark.parametrize(
    "kind", ["forward", "pre", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("always", "keywords"))]
)
def test_a_hook_on_any_module_sees_the_prefill_and_the_decode_step(model: HybridMoE, kind: str) -> None:
    """One module at a time: with all of them hooked, one that is seen could hide that its neighbour would not be."""
    want = steps(model)
    for name, module in one_of_each(model).items():
        seen: list[str] = []
        handle = REGISTER[kind](module, lambda seen=seen: seen.append("call"))
        got = steps(model)
        handle.remove()
        assert len(seen) == 2, f"{name}: {len(seen)} calls in 2 steps"
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_a_hook_on_every_linear_and_a_hook_for_all_modules_see_all_of_them(model: HybridMoE) -> None:
    linears = {name: m for name, m in watched(model).items() if isinstance(m, nn.Linear)}
    seen: list[nn.Module] = []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module)):
        steps(model)
    for name, module in watched(model).items():
        assert seen.count(module) == 2, name
    seen.clear()
    for module in linears.values():
        module.register_forward_hook(lambda module, args, y: seen.append(module))
    steps(model)
    assert len(seen) == 2 * len(linears) > 2 * 24


def test_backward_hooks_are_called(model: HybridMoE) -> None:
    model.requires_grad_(True)
    seen: list[str] = []
    for name, module in watched(model).items():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda *args, name=name: seen.append(name))
    model(TOKENS).sum().backward()
    assert sorted(seen) == sorted(name for name, m in watched(model).items() if isinstance(m, nn.Linear))


class LowRank(nn.Module):
    """A linear with an adapter beside it, as LoRA has it."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = base
        self.change = nn.Parameter(0.1 * torch.ones(outputs, inputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.change.T


def replaced_by_adapter(model: HybridMoE, name: str) -> None:
    linear = model.get_submodule(name)
    model.set_submodule(name, LowRank(linear, linear.in_features, linear.out_features))


def with_another_forward(model: HybridMoE, name: str) -> None:
    linear = model.get_submodule(name)
    linear.forward = lambda x, plain=linear.forward: plain(x) + x.sum(-1, keepdim=True)


def with_a_bias(model: HybridMoE, name: str) -> None:
    linear = model.get_submodule(name)
    linear.bias = nn.Parameter(torch.ones(linear.out_features, dtype=torch.float64))


def parametrized(model: HybridMoE, name: str) -> None:
    parametrizations.orthogonal(model.get_submodule(name))


def pruned(model: HybridMoE, name: str) -> None:
    prune.l1_unstructured(model.get_submodule(name), "weight", amount=0.5)


def subclassed(model: HybridMoE, name: str) -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sum(-1, keepdim=True)

    model.get_submodule(name).__class__ = Shifted


@pytest.mark.parametrize(
    "change", [replaced_by_adapter, with_another_forward, with_a_bias, parametrized, pruned, subclassed]
)
def test_a_linear_that_is_changed_changes_the_logits_of_every_kind_of_step(whole: HybridMoE, change) -> None:
    want = steps(whole)
    for name in (name for name, module in one_of_each(whole).items() if isinstance(module, nn.Linear)):
        model = copy.deepcopy(whole)
        change(model, name)
        for got, old in zip(steps(model), want, strict=True):
            assert (got - old).norm() > 1e-6 * old.norm(), f"{change.__name__}: {name} changes nothing"


@pytest.mark.parametrize("part", ["gate", "experts", "shared_expert", "shared_expert_gate"])
def test_a_part_of_a_mixture_that_is_wrapped_is_called(model: HybridMoE, part: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.count = inner, 0

        def forward(self, *args: Tensor) -> object:
            self.count += 1
            return self.inner(*args)

    want = model(TOKENS)
    wrapped = Wrapped(model.blocks[0].mlp.get_submodule(part))
    model.blocks[0].mlp.add_module(part, wrapped)
    torch.testing.assert_close(model(TOKENS), want, rtol=1e-12, atol=1e-12)
    assert wrapped.count == 1
