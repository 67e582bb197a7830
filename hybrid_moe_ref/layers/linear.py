"""Compute several `nn.Linear` modules for the same rows, in one operation if all of them are plain.

A linear is plain if its call only multiplies by its weight. It is not plain if it has a bias or a hook, or if it is
replaced, wrapped, parametrized or quantised. If one of the modules is not plain, each module is called on its own.

Shapes: N rows, H inputs, O outputs.
"""

from hybrid_moe_kernels import linear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_LINEAR_FORWARD = nn.Linear.forward


def project(x_NH: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Return the output [N, O] of each module for the same N rows. O is the number of outputs of the module."""
    if not has_global_hooks() and all(map(is_plain_linear, linears)):
        outputs: list[Tensor] = linear.project(x_NH, [module._parameters["weight"] for module in linears])
        return outputs
    return [module(x_NH) for module in linears]


def has_global_hooks() -> bool:
    """Whether torch has a global hook, which sees the calls of all modules, or a replaced `nn.Linear.forward`."""
    return bool(_has_any_global_hook()) or nn.Linear.forward is not _LINEAR_FORWARD


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module only multiplies by its weight."""
    if type(module) is not nn.Linear or not is_unhooked(module):
        return False
    parameters = module._parameters
    return type(parameters.get("weight")) is nn.Parameter and parameters["bias"] is None


def is_unhooked(module: nn.Module) -> bool:
    """Whether a kernel can do the work of the module: it has no hook, and its `forward` was not replaced."""
    have = module.__dict__  # every step does this for every module, and attribute access takes twice as long
    return not (
        have["_forward_hooks"]
        or have["_forward_pre_hooks"]
        or have["_backward_hooks"]
        or have["_backward_pre_hooks"]
        or "forward" in have
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module does exactly what `kind` does: its class is `kind` itself, and nobody changed or hooked it."""
    return type(module) is kind and is_unhooked(module) and not has_global_hooks()
