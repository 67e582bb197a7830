"""What is refused before anything is launched, and when nobody looks."""

from __future__ import annotations

from collections.abc import Callable

import kernel_cases as cases
import kernel_comparison as comparison
import pytest
import torch
from hybrid_moe_kernels import checks, registry
from torch import Tensor

from hybrid_moe_ref import HybridMoE, preset

CASES = {case.op: case for case in cases.SMALL + cases.WITHOUT_TRITON}


def spoil_strides(x: Tensor) -> Tensor | None:
    """The same numbers with a gap between the last dimension's."""
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() and x.shape[-1] > 1 else None


MUTATIONS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "shape": lambda x: x[None],
    "dtype": lambda x: x.int(),
    "strides": spoil_strides,
    "device": lambda x: x.to("meta"),
}


def refuse_every_bad_argument(case: comparison.Case, backend: str) -> None:
    """In each way that it can be wrong. The error names an argument, not always the one that was changed."""
    op = comparison.op_of(case)
    good = case.inputs(torch.float32, "cpu", gap=0)
    places = [place for place, x in enumerate(good) if isinstance(x, Tensor)]
    with registry.using(backend):
        op(*good, **case.options)
        for place in places:
            for what, mutate in MUTATIONS.items():
                bad = mutate(good[place])
                if bad is None or (what == "device" and len(places) == 1):
                    continue
                args = [*good[:place], bad, *good[place + 1 :]]
                with pytest.raises(ValueError, match=r"^\w+: .*must"):
                    op(*args, **case.options)
                    pytest.fail(f"{case.op}: argument {place} with another {what} was taken")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_refuses_every_bad_argument(case: comparison.Case) -> None:
    refuse_every_bad_argument(case, "torch")


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_native_kernels_refuse_every_bad_argument(case: comparison.Case) -> None:
    refuse_every_bad_argument(case, "native")


def test_a_models_step_looks_at_no_index_on_a_device() -> None:
    """There, looking would wait for the device in every layer. A meta tensor has no values, so looking is an error."""
    slots, starts = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        checks.slots("slots_B", slots, 4)
    with checks.values_known():
        checks.slots("slots_B", slots, 4)
        checks.cu_seqlens("cu_seqlens_X", starts, 2, 7)
        with pytest.raises(ValueError, match="an index is 9, but must be from 0 to 3"):  # on a CPU the look is free
            checks.slots("slots_B", torch.tensor([9]), 4)
    model, seen = HybridMoE(preset("tiny"), device="meta").init_weights(0), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *args: seen.append(checks._known.count))
    model(torch.zeros(1, 3, dtype=torch.long))
    assert seen and all(seen) and not checks._known.count
