"""Attention of one new token of each sequence over the pages of a KV cache, read in place.

Shapes: B sequences, Q query heads, K KV heads, D head dim, P pages of the pool, L tokens of a page, X pages of the
longest sequence.
"""

from hybrid_moe_kernels.checks import FLOATS, Sizes, can_read_values
from hybrid_moe_kernels.registry import Op
from torch import Tensor, int64


def _check(q_BQD: Tensor, kv_PL2KD: Tensor, table_BX: Tensor, lengths_B: Tensor, longest: int) -> None:
    sizes = Sizes(q_BQD.device)
    sizes.take("q_BQD", q_BQD, *FLOATS, dense=2)
    sizes.known["2"] = 2
    sizes.take("kv_PL2KD", kv_PL2KD, q_BQD.dtype, dense=3)
    sizes.multiple("Q", "K")
    sizes.take("table_BX", table_BX, int64)
    sizes.take("lengths_B", lengths_B, int64)
    if not 1 <= longest <= table_BX.shape[1] * kv_PL2KD.shape[1]:
        most = table_BX.shape[1] * kv_PL2KD.shape[1]
        raise ValueError(f"longest: the value is {longest}, but must be from 1 to X L = {most}")
    if not can_read_values(lengths_B):
        return
    for length in lengths_B.tolist():
        if not 1 <= length <= longest:
            raise ValueError(f"lengths_B: a length is {length}, but must be from 1 to longest = {longest}")
    for page in table_BX.flatten().tolist():
        if not 0 <= page < kv_PL2KD.shape[0]:
            raise ValueError(f"table_BX: a page is {page}, but must be from 0 to {kv_PL2KD.shape[0] - 1}")


decode = Op(__name__, "decode", _check)
