"""Peers on a CPU with the ops' signatures: transformers' layers, mamba-ssm's plain torch, and torch's own functions.

Each is called with one sequence (prefill) or one token of each sequence (decode), and takes no shortcut that the peer's
own model does not take. `peers()` lists those that are installed.

Shapes as in the ops.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[..., Any]
WAYS = ("grouped_mm", "eager", "batched_mm")
"""In which transformers' experts are multiplied."""


def rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_NH, weight_H.shape, 1 + weight_H, eps)


def gate_then_norm(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    return (
        F.rms_norm((x * F.silu(z)).unflatten(-1, (groups, -1)), (x.shape[-1] // groups,), None, eps).flatten(-2)
        * weight
    )


def transformers_peers() -> dict[str, tuple[str, Peer]]:
    """Return transformers' functions by op. Raises ImportError without transformers."""
    sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # importable without a GPU, it fails when called
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as theirs

    def gdn_prefill(q, k, v, g, beta, state_JHKV, slots_B, starts):
        inputs = (x[None] for x in (q, k, v, g, beta))
        y, state = theirs.torch_chunk_gated_delta_rule(
            *inputs, initial_state=state_JHKV[slots_B], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        state_JHKV[slots_B] = state
        return y[0]

    @functools.cache
    def gated_norm(size: int, eps: float) -> Any:
        return theirs.Qwen3_5MoeRMSNormGated(size, eps=eps).requires_grad_(False)

    def give(module: Any, **weights: Tensor) -> Any:
        """Assign a parameter only if it is another one: the assignment takes longer than some of these calls."""
        for name, weight in weights.items():
            if module._parameters[name].data_ptr() != weight.data_ptr() or module._parameters[name].is_meta:
                module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
        return module

    def gdn_decode(qkv, z, b, a, weight, A_log, dt_bias, norm, conv_JSC, state_JHKV, slots, *, num_key_heads, eps):
        (B, H, V), M, K = z.shape, num_key_heads, state_JHKV.shape[2]
        conv_BCS = conv_JSC[slots].mT
        x = theirs.causal_conv1d_update(qkv[..., None], conv_BCS, weight, None, "silu")[..., 0]
        conv_JSC[slots] = conv_BCS.mT
        q, k, v = x.split([M * K, M * K, H * V], -1)
        g = -A_log.float().exp() * F.softplus(a.float() + dt_bias)
        y, state = theirs.torch_recurrent_gated_delta_rule(
            q.view(B, 1, M, K),
            k.view(B, 1, M, K),
            v.view(B, 1, H, V),
            g=g[:, None],
            beta=b.sigmoid()[:, None],
            initial_state=state_JHKV[slots],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        state_JHKV[slots] = state.to(state_JHKV.dtype)
        gated = give(gated_norm(V, eps), weight=norm)
        return gated(y.view(-1, V), z.reshape(-1, V)).view(B, H, V)

    def norm_then_gate(x, z, weight, eps):
        return give(gated_norm(weight.shape[0], eps), weight=weight)(x, z)

    def conv_prefill(x_TC, weight_CW, bias_C, state_JSC, slots_B, starts_X):
        W = weight_CW.shape[1]
        rows = torch.cat([state_JSC[slots_B[0]], x_TC])
        state_JSC[slots_B[0]] = rows[rows.shape[0] - W + 1 :]
        y = theirs.causal_conv1d_fn(rows.mT[None], weight_CW, bias_C, "silu")
        return y[0].mT[W - 1 :]

    def conv_update(x_BC, weight_CW, bias_C, state_JSC, slots_B):
        state_BCS = state_JSC[slots_B].mT
        y = theirs.causal_conv1d_update(x_BC[..., None], state_BCS, weight_CW, bias_C, "silu")
        state_JSC[slots_B] = state_BCS.mT
        return y[..., 0]

    @functools.cache
    def block_of(E: int, K: int, H: int, I: int, S: int) -> Any:
        sizes = {"num_experts": E, "num_experts_per_tok": K, "hidden_size": H, "moe_intermediate_size": I}
        with torch.device("meta"):
            block = theirs.Qwen3_5MoeSparseMoeBlock(Qwen3_5MoeTextConfig(**sizes, shared_expert_intermediate_size=S))
        return block.requires_grad_(False)

    def experts(way: str) -> Peer:
        def run(x_NH, weights_NK, ids_NK, gate_up_EJH, down_EHI):
            E, H, I = down_EHI.shape
            module = block_of(E, ids_NK.shape[1], H, I, 1).experts
            module.config._experts_implementation = way
            return give(module, gate_up_proj=gate_up_EJH, down_proj=down_EHI)(x_NH, ids_NK, weights_NK)

        return run

    def mixture(way: str) -> Peer:
        def run(x_NH, router_EH, gate_up_EJH, down_EHI, gate_SH, up_SH, down_HS, scale_1H, *, top_k):
            E, H, I = down_EHI.shape
            block = block_of(E, top_k, H, I, gate_SH.shape[0])
            block.experts.config._experts_implementation = way
            give(block.gate, weight=router_EH)
            give(block.experts, gate_up_proj=gate_up_EJH, down_proj=down_EHI)
            give(block.shared_expert.gate_proj, weight=gate_SH)
            give(block.shared_expert.up_proj, weight=up_SH)
            give(block.shared_expert.down_proj, weight=down_HS)
            give(block.shared_expert_gate, weight=scale_1H)
            return block(x_NH[None])[0]

        return run

    def rotate(x_THD, cos_TR, sin_TR):
        cos, sin = (torch.cat((y, y), -1) for y in (cos_TR, sin_TR))
        return theirs.apply_rotary_pos_emb(x_THD, x_THD[:, :0], cos, sin)[0]

    functions: dict[str, tuple[str, Peer]] = {
        "gated_delta_rule.prefill": ("transformers", gdn_prefill),
        "gated_delta_rule.decode": ("transformers", gdn_decode),
        "causal_conv.prefill": ("transformers", conv_prefill),
        "causal_conv.update": ("transformers", conv_update),
        "norm.norm_then_gate": ("transformers", norm_then_gate),
        "rope.rotate": ("transformers", rotate),
    }
    for way in WAYS:
        functions[f"moe.experts {way}"] = (f"transformers {way}", experts(way))
        functions[f"moe.mixture {way}"] = (f"transformers {way}", mixture(way))
    return functions


def mamba_peers() -> dict[str, tuple[str, Peer]]:
    """Return mamba-ssm's plain torch functions, from the folder of the set-up. Raises ImportError without them."""
    for folder in (Path(sys.prefix, "oracles"), *map(Path, sys.path)):
        if (folder / "mamba_ssm").is_dir():
            break
    else:
        raise ModuleNotFoundError("mamba_ssm is not installed")
    package = types.ModuleType("mamba_ssm")  # its own __init__ needs a GPU
    package.__path__ = [str(folder / "mamba_ssm")]
    sys.modules.setdefault("mamba_ssm", package)
    sys.path.append(str(folder))
    try:
        from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
    finally:
        sys.path.remove(str(folder))

    def prefill(x_THP, dt_TH, A_H, b_TGN, c_TGN, D_H, state_JHPN, slots_B, starts_X):
        T, H, G = *x_THP.shape[:2], b_TGN.shape[1]
        chunk = 64
        pad = -T % chunk
        x, dt, b, c = (F.pad(y.float(), (0, 0) * (y.dim() - 1) + (0, pad))[None] for y in (x_THP, dt_TH, b_TGN, c_TGN))
        b, c = (y.repeat_interleave(H // G, dim=2) for y in (b, c))
        y, state = ssd_minimal_discrete(x * dt[..., None], dt * A_H, b, c, chunk, state_JHPN[slots_B][:, None])
        state_JHPN[slots_B] = state
        return (y[0, :T] + D_H[:, None] * x_THP).to(x_THP.dtype)

    def decode(
        xbc, z, dt, weight, bias, A_log, D, dt_bias, norm, conv_JSC, state_JHPN, slots, *, num_groups, dt_limit, eps
    ):
        (H, P, N), G = state_JHPN.shape[1:], num_groups
        window = torch.cat([conv_JSC[slots], xbc[:, None]], 1)
        conv_JSC[slots] = window[:, 1:]
        x, b, c = F.silu((window * weight.mT).sum(1) + (0 if bias is None else bias)).split([H * P, G * N, G * N], -1)
        dt = F.softplus(dt.float() + dt_bias).clamp(*dt_limit)
        state = state_JHPN[slots]
        y = selective_state_update_ref(
            state,
            x.view(-1, H, P),
            dt[..., None].expand(-1, -1, P),
            -A_log.float().exp()[:, None, None].expand(-1, P, N),
            b.view(-1, G, N),
            c.view(-1, G, N),
            D[:, None].expand(-1, P),
        )
        state_JHPN[slots] = state
        y = y.flatten(-2).to(xbc.dtype)
        return y if norm is None else gate_then_norm(y, z, norm, G, eps)

    return {"ssd.prefill": ("mamba_ssm minimal", prefill), "ssd.decode": ("mamba_ssm reference", decode)}


def peers() -> tuple[dict[str, tuple[str, Peer]], list[str]]:
    """Return (name, function) by op (for `moe` by op and way), and the packages that are not installed."""
    functions: dict[str, tuple[str, Peer]] = {
        "norm.rms_norm": ("torch F.rms_norm", rms_norm),
        "norm.gate_then_norm": ("torch F.rms_norm", gate_then_norm),
    }
    lacking = []
    for more in (transformers_peers, mamba_peers):
        try:
            functions |= more()
        except ImportError as error:
            lacking.append(str(error))
    return functions, lacking
