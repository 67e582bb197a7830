"""Gated MLP experts in plain torch: y[n] = sum_k weight[n, k] down[e] (silu(gate[e] x[n]) * up[e] x[n]), e = id[n, k].

Three implementations give the same result. With few picks, each pick is a matrix-vector product that reads only its
own expert. With many picks, rows are sorted by expert, and each expert multiplies its rows at once. The third
implementation pads the rows of all experts to one length; only the engine's tuning chooses it.

Shapes: N rows, K picks (chosen experts) of a row, P = N K picks, H hidden, E experts held, I intermediate, J = 2 I
(gate, then up), S intermediate of the shared expert, R picks whose expert is held, W rows of the busiest
expert, A inputs and B outputs of a product.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.linear.reference import product, project
from hybrid_moe_kernels.precision import narrow, widen
from hybrid_moe_kernels.sequences import differentiable
from torch import Tensor


def route(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return weights and ids [N, K] of the `top_k` most probable experts of each row, largest weight first.

    The weights are the softmax over all experts, divided by the sum of the weights of the chosen experts. They are
    computed in float32, or in float64 for float64 logits.
    """
    logits_NK, ids_NK = widen(logits_NE).topk(top_k, dim=-1)
    # The softmax over all experts, renormalised over the picks, equals the softmax over the picks.
    return logits_NK.softmax(-1), ids_NK


def experts(x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """Sum the outputs of the chosen experts of each row. Return y [N, H].

    The sum is computed in float32, or in float64 for float64 inputs.

    Ids outside 0 to E - 1 are experts that other ranks hold; they contribute nothing.
    """
    few = 2 * ids_NK.numel() <= gate_up_EJH.shape[0] and not differentiable(x_NH, gate_up_EJH, down_EHI)
    per_pick = pick_by_pick if few else expert_by_expert
    return combine(per_pick(x_NH, ids_NK, gate_up_EJH, down_EHI), weights_NK)


def combine(out_PH: Tensor, weights_NK: Tensor) -> Tensor:
    """Return the weighted sum [N, H] of each row's picks."""
    out_NKH = widen(out_PH).view(*weights_NK.shape, out_PH.shape[-1])
    y_NH = torch.bmm(narrow(weights_NK, out_NKH.dtype)[:, None], out_NKH)[:, 0]
    return narrow(y_NH, out_PH.dtype)


def mixture(
    x_NH: Tensor,
    router_EH: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    shared_gate_SH: Tensor,
    shared_up_SH: Tensor,
    shared_down_HS: Tensor,
    shared_scale_1H: Tensor,
    *,
    top_k: int,
) -> Tensor:
    """Compute a whole MoE layer of which this rank holds all experts. Return y [N, H].

    y is the sum of the router's `top_k` experts of each row, plus the shared expert times sigmoid(shared_scale x).
    """
    weights_NK, ids_NK = route(product(x_NH, router_EH), top_k)
    routed_NH = experts(x_NH, weights_NK, ids_NK, gate_up_EJH, down_EHI)
    gate_NS, up_NS = project(x_NH, [shared_gate_SH, shared_up_SH])
    hidden_NS = F.silu(gate_NS) * up_NS
    return routed_NH + F.linear(x_NH, shared_scale_1H).sigmoid() * F.linear(hidden_NS, shared_down_HS)


def pick_by_pick(x_NH: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """Return each pick's output [P, H], zero if its expert is not held, by one matrix-vector product for each pick.

    This is not differentiable, because it writes in place.
    """
    E, J, H = gate_up_EJH.shape
    K = ids_NK.shape[1]
    held = [(pick, e) for pick, e in enumerate(ids_NK.flatten().tolist()) if 0 <= e < E]
    make = x_NH.new_empty if len(held) == ids_NK.numel() else x_NH.new_zeros
    hidden_PJ, out_PH = make(ids_NK.numel(), J), make(ids_NK.numel(), H)
    x, hidden, out = x_NH.unbind(), hidden_PJ.unbind(), out_PH.unbind()
    for pick, e in held:
        torch.mv(gate_up_EJH[e], x[pick // K], out=hidden[pick])
    acted = _act(hidden_PJ).unbind()
    for pick, e in held:
        torch.mv(down_EHI[e], acted[pick], out=out[pick])
    return out_PH


def expert_by_expert(x_NH: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """Return each pick's output [P, H], zero if its expert is not held.

    Sorts the picks by expert, so that each expert multiplies all its rows at once.
    """
    (E, _, H), K = gate_up_EJH.shape, ids_NK.shape[1]
    ids_P = ids_NK.flatten()
    ids_P = ids_P.where((ids_P >= 0) & (ids_P < E), E)
    counts_E = ids_P.bincount(minlength=E + 1)[:E]
    picks_R = ids_P.argsort(stable=True)[: int(counts_E.sum())]
    hidden_RJ = _grouped_product(x_NH[picks_R // K], gate_up_EJH.mT, counts_E)
    out_PH = x_NH.new_zeros(ids_NK.numel(), H)
    out_PH[picks_R] = _grouped_product(_act(hidden_RJ), down_EHI.mT, counts_E)
    return out_PH


def padded_to_widest(x_NH: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """Return each pick's output [P, H], zero if its expert is not held.

    Computes all experts in one batched product, padding the rows of each expert to as many as the busiest has.
    """
    E, K = gate_up_EJH.shape[0], ids_NK.shape[1]
    out_PH = x_NH.new_zeros(ids_NK.numel(), x_NH.shape[1])
    ids_P = ids_NK.flatten()
    held_R = ((ids_P >= 0) & (ids_P < E)).nonzero()[:, 0]
    if not len(held_R):
        return out_PH
    held_R = held_R[ids_P[held_R].argsort(stable=True)]
    expert_R = ids_P[held_R]
    counts_E = expert_R.bincount(minlength=E)
    place_R = torch.arange(len(held_R), device=x_NH.device) - (counts_E.cumsum(0) - counts_E)[expert_R]
    rows_EWH = x_NH.new_zeros(E, int(counts_E.max()), x_NH.shape[1])
    rows_EWH[expert_R, place_R] = x_NH[held_R // K]
    gate, up = torch.bmm(rows_EWH, gate_up_EJH.mT).chunk(2, dim=-1)
    out_PH[held_R] = torch.bmm(F.silu(gate) * up, down_EHI.mT)[expert_R, place_R]
    return out_PH


def _act(hidden__J: Tensor) -> Tensor:
    gate__I, up__I = hidden__J.chunk(2, dim=-1)
    return F.silu(gate__I) * up__I


def _grouped_product(x_RA: Tensor, weight_EAB: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply the first counts[0] rows by weight[0], the next counts[1] rows by weight[1], and so on."""
    if _grouped_mm_takes(x_RA, weight_EAB):
        return F.grouped_mm(x_RA, weight_EAB, offs=counts_E.cumsum(0, dtype=torch.int32))
    counts = counts_E.tolist()
    if differentiable(x_RA, weight_EAB):
        return torch.cat([x @ weight_EAB[e] for e, x in enumerate(x_RA.split(counts))])
    out_RB, end = x_RA.new_empty(x_RA.shape[0], weight_EAB.shape[2]), 0
    for e, count in enumerate(counts):
        if count:  # only a few of many experts have rows, so no view is made for the others
            start, end = end, end + count
            torch.mm(x_RA[start:end], weight_EAB[e], out=out_RB[start:end])
    return out_RB


def _grouped_mm_takes(x_RA: Tensor, weight_EAB: Tensor) -> bool:
    """Return whether torch's grouped product supports these tensors.

    It supports no float64, on GPUs only bfloat16, and only rows that are aligned to 16 bytes.
    """
    dtypes = (torch.bfloat16,) if x_RA.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    aligned = all(size * x_RA.element_size() % 16 == 0 for size in weight_EAB.shape[1:])
    return x_RA.dtype in dtypes and aligned and x_RA.shape[0] > 0
