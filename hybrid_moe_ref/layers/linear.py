"""Calls of `nn.Linear` modules, several as one operation where that makes no difference.

A linear that is replaced, wrapped, parametrized, quantised or watched by a hook is called as the module that it is.

Shapes: N rows, H inputs, O outputs.
"""

from hybrid_moe_kernels import linear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_LINEAR_FORWARD = nn.Linear.forward


def project(x_NH: Tensor, *linears: nn.Module) -> list[Tensor]:
    """The output [N, O] of each module for the same rows."""
    if not is_every_module_watched() and all(map(is_plain_linear, linears)):
        outputs: list[Tensor] = linear.project(x_NH, [module._parameters["weight"] for module in linears])
        return outputs
    return [module(x_NH) for module in linears]


def is_every_module_watched() -> bool:
    """Whether there are hooks for the calls of all modules."""
    return bool(_has_any_global_hook()) or nn.Linear.forward is not _LINEAR_FORWARD


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module does no more than multiply with its weight."""
    if type(module) is not nn.Linear or not is_unwatched(module):
        return False
    parameters = module._parameters
    return type(parameters.get("weight")) is nn.Parameter and parameters["bias"] is None


def is_unwatched(module: nn.Module) -> bool:
    """Whether the module has no hook, and no `forward` of its own, that would miss a call."""
    have = module.__dict__  # a step asks this of each module of each layer, and attributes take twice as long
    return not (
        have["_forward_hooks"]
        or have["_forward_pre_hooks"]
        or have["_backward_hooks"]
        or have["_backward_pre_hooks"]
        or "forward" in have
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does what `kind` does and no more: nothing replaces, changes or watches it."""
    return type(module) is kind and is_unwatched(module) and not is_every_module_watched()
