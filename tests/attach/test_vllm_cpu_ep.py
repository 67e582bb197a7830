"""Expert parallelism on a CPU: what the ranks compute adds up to what one rank with all experts computes."""

from __future__ import annotations

import types

import torch

from repro.attach.vllm import cpu_ep

NUM_EXPERTS, TOP_K, HIDDEN, TOKENS = 8, 3, 16, 11


def layer_of(experts: list[tuple[torch.Tensor, torch.Tensor]], first: int, last: int) -> types.SimpleNamespace:
    """A layer of vLLM 0.20 with the experts first..last-1 of all."""
    expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
    expert_map[first:last] = torch.arange(last - first, dtype=torch.int32)
    mine = experts[first:last]
    return types.SimpleNamespace(
        expert_map=expert_map,
        gate_up_linear=[lambda x, w=gate_up: x @ w for gate_up, _ in mine],
        down_linear=[lambda x, w=down: x @ w for _, down in mine],
    )


def test_the_experts_of_two_ranks_add_up_to_all_experts():
    torch.manual_seed(3)
    experts = [(torch.randn(HIDDEN, 24), torch.randn(12, HIDDEN)) for _ in range(NUM_EXPERTS)]
    rows = torch.randn(TOKENS, HIDDEN)
    weights, ids = torch.softmax(torch.randn(TOKENS, NUM_EXPERTS), -1).topk(TOP_K)
    halves = [
        cpu_ep.forward_of_local_experts(None, layer_of(experts, first, first + 4), rows, weights, ids, "silu")
        for first in (0, 4)
    ]
    expected = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (rows[token] @ experts[expert][0]).chunk(2)
            expected[token] += weight * (torch.nn.functional.silu(gate) * up @ experts[expert][1])
    torch.testing.assert_close(sum(halves), expected, atol=1e-4, rtol=1e-4)


def test_ids_of_other_ranks_have_the_weight_0_and_a_local_id_that_exists():
    expert_map = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    weights, ids = cpu_ep.local_experts(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[3, 0, 2]]), expert_map)
    assert (weights > 0).tolist() == [[True, False, True]] and ids.tolist() == [[1, 0, 0]]
    assert cpu_ep.local_experts(weights, ids, None) == (weights, ids), "one rank has all experts"
