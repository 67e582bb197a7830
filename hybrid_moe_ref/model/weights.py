"""Fill a model with seeded random weights.

Every parameter has its own random generator, seeded by (seed, name). In a parameter of experts, every expert has its
own generator, so a rank draws random numbers only for the experts that it holds. If a rank holds a part of another
parameter, the whole parameter is drawn and then cut.

Numbers are drawn in float32 on the CPU and then cast to the dtype of the parameter. So the device does not change the
weights, and the dtype changes them only by rounding.

A weight's scale depends on its fan-in (number of inputs), so that activations keep their size through any number of
layers.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from hybrid_moe_ref.layers.moe import Experts
from hybrid_moe_ref.slices import Slice


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place. No parameter is allowed to be on the meta device."""
    slices: dict[str, Slice] = getattr(model, "slices", {})
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
                if isinstance(module, Experts):
                    # Wrapped experts keep the name of the unwrapped model.
                    name = module_name.split(".experts")[0] + ".experts." + name.rpartition(".")[2]
                    part = slices.get(name, Slice(tuple(parameter.shape))).row
                    for index, expert in enumerate(parameter, start=module.first_expert):
                        expert.copy_(part.of(_draw(name, part.full_shape, f"{seed} {name} {index}")))
                else:
                    part = slices.get(name, Slice(tuple(parameter.shape)))
                    parameter.copy_(part.of(_draw(name, part.full_shape, f"{seed} {name}")))


def _draw(name: str, shape: tuple[int, ...], key: str) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    owner, kind = name.split(".")[-2:]
    if kind == "A_log":
        return torch.empty(shape).uniform_(1, 16, generator=generator).log_()
    if kind == "dt_bias":
        # softplus(dt_bias) is spread evenly in logarithm over 0.001 to 0.1
        dt = torch.empty(shape).uniform_(math.log(0.001), math.log(0.1), generator=generator).exp_()
        return dt.expm1().log()
    noise = torch.randn(shape, generator=generator)
    if kind == "D" or name.endswith(("linear_attn.norm.weight", "mamba.norm.weight")):
        return 1 + 0.1 * noise
    if kind == "bias" or "norm" in owner:
        return 0.1 * noise
    if owner == "embed_tokens":
        return noise
    # Linear [out, in], depthwise filter [channels, 1, width], expert [out, in]: fan-in is the last dimension.
    return noise * shape[-1] ** -0.5
