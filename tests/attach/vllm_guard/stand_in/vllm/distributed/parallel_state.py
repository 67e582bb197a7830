"""A stand-in: groups of torch.distributed under vLLM's names."""

import torch
import torch.distributed as dist


class GroupCoordinator:
    def __init__(self, name, ranks):
        self.unique_name, self.ranks = f"{name}:0", ranks
        self.device_group, self.cpu_group = dist.new_group(ranks), dist.new_group(ranks)

    def all_gatherv(self, rows):
        parts = [torch.empty_like(rows) for _ in self.ranks]
        dist.all_gather(parts, rows, group=self.device_group)
        return torch.cat(parts)

    def reduce_scatterv(self, rows):
        dist.all_reduce(rows, group=self.device_group)
        return rows


_dp = None


def get_dp_group():
    global _dp
    if _dp is None:
        _dp = GroupCoordinator("dp", list(range(dist.get_world_size())))
    return _dp
