"""Cases of every op with sizes drawn by hypothesis."""

from __future__ import annotations

import kernel_cases as cases
from hypothesis import strategies as some
from hypothesis.strategies import SearchStrategy
from kernel_comparison import Case


def any_sizes(
    lengths: SearchStrategy[list[int]], rows: SearchStrategy[int], most: int
) -> dict[str, SearchStrategy[Case]]:
    """Return a strategy for each op: `lengths` of sequences, `rows` if the op has no sequences, heads of up to `most`
    features.
    """
    seed, batch, yes_or_no = some.integers(0, 2**31), lengths.map(len), some.booleans()
    few, many, width = some.integers(1, 3), some.integers(1, most), some.integers(1, 5)
    rotary = some.integers(1, most // 2).flatmap(lambda R: some.tuples(some.integers(2 * R, most), some.just(R)))
    picks = some.integers(1, 10).flatmap(lambda E: some.tuples(some.just(E), some.integers(1, E)))
    return {
        "attention.decode": some.builds(cases.attention_decode, seed, lengths, some.integers(1, 24), few, few, many),
        "gated_delta_rule.prefill": some.builds(
            cases.gdn_prefill, seed, lengths, few, few, many, many, repeated=yes_or_no
        ),
        "gated_delta_rule.decode": some.builds(cases.gdn_decode, seed, batch, few, few, many, many, width),
        "ssd.prefill": some.builds(cases.ssd_prefill, seed, lengths, few, few, many, many),
        "ssd.decode": some.builds(
            cases.ssd_decode, seed, batch, few, few, many, many, width, bias=yes_or_no, norm=yes_or_no
        ),
        "causal_conv.prefill": some.builds(cases.conv_prefill, seed, lengths, some.integers(1, 300), width, yes_or_no),
        "causal_conv.update": some.builds(cases.conv_update, seed, batch, some.integers(1, 300), width, yes_or_no),
        "moe.route": some.builds(cases.route, seed, rows, E=some.integers(6, 40), K=some.integers(1, 6)),
        "moe.experts": some.builds(cases.experts, seed, rows, some.integers(1, 10), few, many, many),
        "moe.mixture": some.builds(
            lambda seed, N, picks, H, I, S: cases.mixture(seed, N, *picks, H, I, S), seed, rows, picks, many, many, many
        ),
        "norm.rms_norm": some.builds(cases.rms_norm, seed, rows, some.integers(1, 300)),
        "norm.norm_then_gate": some.builds(cases.norm_then_gate, seed, rows, many),
        "norm.gate_then_norm": some.builds(cases.gate_then_norm, seed, rows, few, many),
        "rope.rotate": some.builds(
            lambda seed, T, H, rotary: cases.rotate(seed, T, H, *rotary), seed, rows, few, rotary
        ),
        "linear.project": some.builds(cases.project, seed, rows, many, some.lists(many, min_size=1, max_size=3)),
    }
