"""The table of builders. A builder compiles, before the ranks communicate, kernels that the first execution needs.

The builders of FlashInfer call the functions of FlashInfer that the first execution would call. They were written from
FlashInfer's source, and have not been run, for lack of a GPU. If a version of FlashInfer lacks such a function, the
start reports this and goes on, and the first execution builds these kernels.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

VARIABLE = "HMR_GUARD_BUILDERS"


class BuilderError(ValueError):
    """An entry of HMR_GUARD_BUILDERS does not have the form module:function, or its function cannot be imported."""


class Builder(NamedTuple):
    """Builds kernels before the ranks communicate.

    name    what is built, for the log: "FlashInfer's GDN prefill"
    wanted  returns whether a model uses these kernels
    build   is called on every rank; the first call on a host builds, later calls load what was built
    """

    name: str
    wanted: Callable[[Any], bool]
    build: Callable[[], object]


def _gdn_on_flashinfer(model: Any) -> bool:
    return any(getattr(module, "gdn_prefill_backend", "") == "flashinfer" for module in model.modules())


def _moe_on_flashinfer(model: Any) -> bool:
    """Whether a layer of the model has vLLM's FlashInferExperts (CUTLASS) as its experts.

    The version of vLLM decides which object has the experts as its attribute ``fused_experts``: the layer's
    ``quant_method``, ``quant_method.moe_kernel``, or ``quant_method.kernel``.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        for holder in (method, getattr(method, "moe_kernel", None), getattr(method, "kernel", None)):
            if type(getattr(holder, "fused_experts", None)).__name__ == "FlashInferExperts":
                return True
    return False


def _build_gdn() -> object:
    return importlib.import_module("flashinfer.gdn_prefill").get_gdn_prefill_module()


def _build_moe() -> object:
    import torch

    major, minor = torch.cuda.get_device_capability()
    core = importlib.import_module("flashinfer.fused_moe.core")
    return core.get_cutlass_fused_moe_module(f"{10 * major + minor}")


BUILDERS = (
    # FlashInfer 0.6 and 0.7 (vLLM 0.20 to 0.33): flashinfer/gdn_prefill.py, 33 sources on SM90
    Builder("FlashInfer's GDN prefill", _gdn_on_flashinfer, _build_gdn),
    # FlashInfer 0.6 and 0.7: flashinfer/fused_moe/core.py, 173 sources on SM90
    Builder("FlashInfer's CUTLASS fused MoE", _moe_on_flashinfer, _build_moe),
)


def chosen(model: Any) -> Iterator[Builder]:
    """Yield the builders (each builds one extension of kernels) that the model needs, then those of HMR_GUARD_BUILDERS.

    model: the torch.nn.Module of this rank; None if it is not known, then only HMR_GUARD_BUILDERS counts

    Raises BuilderError if HMR_GUARD_BUILDERS names a function that cannot be imported.
    """
    for builder in BUILDERS:
        if model is not None and builder.wanted(model):
            yield builder
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        module, _, function = name.strip().partition(":")
        try:
            build = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise BuilderError(f"{VARIABLE} names {name}: {error}; write module:function,module:function,…") from None
        yield Builder(name.strip(), lambda model: True, build)
