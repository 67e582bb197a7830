"""A plug-in for tests: vLLM 0.32 asks "is anyone unfinished?" as 0.20 does. On with HMR_QUESTION=0.20.

0.20 asks after each 32nd execution of a wave, by the maximum of one int32. 0.32 asks after the first one and after each
16th, by the sum of two. All else of 0.32 stays. It has to be loaded before the recorder, which hooks what stands here.
"""

from __future__ import annotations

import functools
import os
from typing import Any

INTERVAL = 32


def register() -> None:
    if os.environ.get("HMR_QUESTION") == "0.20":
        _install()


@functools.cache
def _install() -> None:
    from vllm.config import ParallelConfig
    from vllm.v1.engine.core import DPEngineCoreProc

    ParallelConfig.sync_dp_state = staticmethod(sync_dp_state)
    DPEngineCoreProc._has_global_unfinished_reqs = has_global_unfinished_reqs


def sync_dp_state(dp_group: Any, has_unfinished: bool, pending_pause: bool) -> tuple[bool, bool]:
    """Ask with the payload of 0.20, which knows no pause."""
    import torch

    answer = torch.tensor([int(has_unfinished)], dtype=torch.int32)
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX, group=dp_group)
    return bool(answer.item()), False


def has_global_unfinished_reqs(engine: Any, local_unfinished: bool) -> bool:
    """Count an execution, and ask after those of 0.20."""
    from vllm.config import ParallelConfig

    engine.step_counter += 1
    if engine.step_counter % INTERVAL:
        return True
    unfinished: bool = ParallelConfig.sync_dp_state(engine.dp_group, local_unfinished, False)[0]
    return unfinished
