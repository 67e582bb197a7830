"""A stand-in: the step agreement."""

import torch
import torch.distributed as dist

from vllm.distributed.parallel_state import get_dp_group


def _run_ar(num_tokens, rank, size):
    rows = torch.zeros(4, size, dtype=torch.int32)
    rows[0][rank] = rows[1][rank] = num_tokens
    dist.all_reduce(rows, group=get_dp_group().cpu_group)
    return rows
