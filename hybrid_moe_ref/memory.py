"""What a model and its cache will take, told before anything is allocated; and what ran out, told afterwards."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

from hybrid_moe_ref.cache import CacheExhausted, cache_layout
from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.model import HybridMoE

_ALLOCATORS_SAY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


def check_memory(model: HybridMoE, num_pages: int, device: str, num_ranks: int = 1) -> None:
    """A model that cannot fit is one line at once, not a machine that swaps. `model` is on the meta device, and stands
    for each of `num_ranks` ranks on this machine, with a cache of `num_pages`.

    Raises ConfigError with what is needed and what is there.
    """
    if torch.device(device).type == "cpu":
        what, there = "this machine has", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elif num_ranks == 1:
        what, there = f"{device} has", torch.cuda.mem_get_info(device)[1]
    else:
        return  # ranks are forked, which a process that has used CUDA must not do
    layout = cache_layout(model.config, model.dtype)
    weights = num_ranks * sum(parameter.nbytes for parameter in model.parameters())
    cache = num_ranks * num_pages * layout.page_bytes * layout.group_size
    if weights + cache > there:
        where = f" on {num_ranks} ranks" if num_ranks > 1 else ""
        needs = f"the model needs {_gb(weights)}{where} and its cache {_gb(cache)}"
        raise ConfigError(f"{needs}, {what} {_gb(there)}")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def peak_rss() -> int:
    """The most bytes of memory that this process has had; without what its parent had before it, where /proc tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Linux hands this on through fork and exec. macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shortage(error: RuntimeError) -> str:
    """The line of an allocator, or of a cache, that had no room; "" for any other error."""
    text = str(error).partition("\n")[0]
    if isinstance(error, CacheExhausted | torch.OutOfMemoryError) or any(words in text for words in _ALLOCATORS_SAY):
        return text
    return ""
