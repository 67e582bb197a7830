"""One call of a kernel, and the comparison of its result with the float64 reference.

Inputs are views into larger tensors of NaN. Pools of states have slots and gaps that no sequence uses. The memory that
an implementation allocates is NaN until it is written. So a kernel that reads too much or writes too little is noticed.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from hybrid_moe_kernels.registry import Op
from torch import Tensor


@dataclass
class Case:
    """One call of an op: its arguments in float64, and which arguments are states that it changes in place."""

    op: str
    sizes: dict[str, Any]
    seed: int
    args: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    states: tuple[int, ...] = ()  # indices of the states among args
    # argument -> how many of its last dimensions stay contiguous, if not one
    dense: dict[int, int] = field(default_factory=dict)
    wide: tuple[int, ...] = ()  # indices of the arguments that stay float32 when the others are bfloat16

    def __str__(self) -> str:
        return f"{self.op} of {self.sizes}, seed {self.seed}"

    def inputs(self, dtype: torch.dtype, device: str, gap: int = 16) -> list[Any]:
        """Return new arguments in ``dtype``. Their rows are ``gap`` numbers apart in memory."""

        def one(place: int, x: Any) -> Any:
            if isinstance(x, list):
                return [one(place, each) for each in x]
            if not isinstance(x, Tensor):
                return x
            if x.is_floating_point():
                is_wide = place in self.wide or dtype == torch.float64
                x = x.to(torch.promote_types(dtype, torch.float32) if is_wide else dtype)
            x = x.to(device, copy=True)
            return _space(x, self.dense.get(place, 1), gap) if gap and x.is_floating_point() else x

        return [one(place, x) for place, x in enumerate(self.args)]

    def rounded(self, dtype: torch.dtype) -> Case:
        """Return the case with arguments that `dtype` holds exactly. Then only the arithmetic can be wrong."""

        def widened(x: Any) -> Any:
            if isinstance(x, list):
                return [widened(each) for each in x]
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        return replace(self, args=[widened(x) for x in self.inputs(dtype, "cpu", gap=0)])


def _space(x: Tensor, dense: int, gap: int) -> Tensor:
    """Return the same numbers as a view into a tensor of NaN, in which only the last dimensions are contiguous."""
    if x.dim() <= dense or x.numel() == 0:
        return x
    flat = x.flatten(-dense)
    room = torch.full((*flat.shape[:-1], flat.shape[-1] + gap), math.nan, dtype=x.dtype, device=x.device)
    view = room[..., gap // 2 : gap // 2 + flat.shape[-1]]
    view.copy_(flat)
    return view.unflatten(-1, x.shape[-dense:])


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let torch.empty return NaN, and for integers the largest number."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import Inductor, 70 MB
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def error(got: Tensor, want: Tensor) -> float:
    """Return the relative error of the whole tensor; infinity if a number is not finite."""
    got, want = got.double().cpu(), want.double()
    if not torch.isfinite(got).all():
        return math.inf
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


Result = list[Tensor]


def module_of(case: Case, backend: str) -> ModuleType:
    """Return the backend's implementation of the case's op."""
    return importlib.import_module(f"hybrid_moe_kernels.{case.op.partition('.')[0]}.{backend}")


def op_of(case: Case) -> Op:
    package, _, function = case.op.partition(".")
    op: Op = getattr(importlib.import_module(f"hybrid_moe_kernels.{package}"), function)
    return op


def results(case: Case, module: Any, args: list[Any]) -> Result:
    """Return the outputs of the module's function, followed by the states."""
    out = getattr(module, case.op.partition(".")[2])(*args, **case.options)
    return [*(out if isinstance(out, tuple | list) else (out,)), *(args[place] for place in case.states)]


def call(case: Case, module: Any, dtype: torch.dtype, device: str, gap: int = 16) -> Result:
    """Return the results on new arguments. States that belong to no sequence must not change."""
    args = case.inputs(dtype, device, gap)
    before = [args[place].clone() for place in case.states]
    with poisoned():
        got = results(case, module, args)
    for place, old in zip(case.states, before, strict=True):
        used = torch.zeros(old.shape[0], dtype=torch.bool, device=old.device)
        used[args[case.states[-1] + 1]] = True  # slots come after the states
        assert torch.equal(args[place][~used], old[~used]), f"{case}: a slot changed that no sequence has"
    return got


def reference(case: Case, dtype: torch.dtype) -> Result:
    return call(case, module_of(case, "reference"), dtype, "cpu")


def expected(case: Case, dtype: torch.dtype) -> tuple[Result, Result]:
    """Return the reference's results in float64 and in `dtype`, with which `check` compares."""
    return reference(case, torch.float64), reference(case, dtype)


def check(
    case: Case,
    module: Any,
    dtype: torch.dtype,
    device: str = "cpu",
    gap: int = 16,
    results: tuple[Result, Result] | None = None,
) -> None:
    """Compare the module's results with `expected(case, dtype)`, which a caller of many modules computes once.

    float32: within 5e-6 of float64. bfloat16: at most 1.2 times as far from it as the reference in bfloat16, 1.5
    times for results of fewer than 2,000 numbers, which round by luck. Fewer than 100 different numbers may be what
    large ones leave when they cancel: they are allowed four times what a rounding of the arguments does to them."""
    want, theirs = results or expected(case, dtype)
    op_of(case).check(*case.inputs(dtype, device, gap), **case.options)
    got = call(case, module, dtype, device, gap)
    for number, (mine, yours, right) in enumerate(zip(got, theirs, want, strict=True)):
        about = f"{case}, {dtype}, gap {gap}: result {number}"
        assert (mine.shape, mine.dtype) == (yours.shape, yours.dtype), f"{about} is {mine.dtype} {list(mine.shape)}"
        if not right.is_floating_point():
            assert torch.equal(mine.cpu(), right), f"{about} differs"
            continue
        limit, off = 5e-6, error(mine, right)
        if dtype == torch.bfloat16:
            limit = (1.2 if right.numel() >= 2000 else 1.5) * error(yours, right) + 1e-5
        if off > limit and right.unique().numel() < 100:
            limit = max(limit, 4 * sensitivity(case, dtype, want)[number])
        assert off <= limit, f"{about} is off by {off:.2e}, allowed {limit:.2e}"


def sensitivity(case: Case, dtype: torch.dtype, want: Result) -> list[float]:
    """Return how far the results move in float64 if every argument is changed by up to one rounding to `dtype`.

    The largest of four tries is returned.
    """
    moved, r = [0.0] * len(want), torch.Generator().manual_seed(0)

    def shaken(x: Any) -> Any:
        if isinstance(x, list):
            return [shaken(each) for each in x]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x * (1 + torch.finfo(dtype).eps * (torch.rand(x.shape, generator=r).double() - 0.5))

    for _ in range(4):
        got = reference(replace(case, args=[shaken(x) for x in case.args]), torch.float64)
        moved = [max(before, error(x, right)) for before, x, right in zip(moved, got, want, strict=True)]
    return moved
