"""The gated delta rule in Triton: `chunks` computes prompts of any lengths, `step` a decode step in one launch."""

from hybrid_moe_kernels.gated_delta_rule.triton import chunks, step
from hybrid_moe_kernels.gated_delta_rule.triton.chunks import prefill
from hybrid_moe_kernels.gated_delta_rule.triton.step import decode
from hybrid_moe_kernels.tile import DEVICES, DTYPES, missing

__all__ = ["CONFIGS", "DEVICES", "DTYPES", "decode", "missing", "prefill"]

CONFIGS = {"gated_delta_rule.prefill": chunks.CONFIGS, "gated_delta_rule.decode": step.CONFIGS}
