"""Check before allocation whether a model and its cache fit into memory, and describe an out-of-memory error."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

from hybrid_moe_ref.cache.hybrid_cache import CacheExhausted, cache_layout
from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.model import HybridMoE

_ALLOCATOR_WORDS = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
_CGROUPS = Path("/sys/fs/cgroup")


def check_memory(model: HybridMoE, num_pages: int, device: str, num_ranks: int = 1, *, suggestion: str = "") -> None:
    """Refuse a model that does not fit into memory, before the machine swaps or the process is killed.

    The check counts the weights and the cache, but not the activations. If several ranks use GPUs, nothing is checked.

    model       one rank's model, on the meta device
    num_pages   pages of one rank's cache
    num_ranks   number of ranks on this machine; all of them have the same sizes
    suggestion  end of the error text: what to change

    Raises ConfigError with the memory that is needed and the memory that is available.
    """
    if torch.device(device).type == "cpu":
        machine_has, there = "this machine has", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if (limit := container_limit()) < there:
            machine_has, there = "this container can use", limit
    elif num_ranks == 1 and torch.device(device).type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
        machine_has, suggestion = f"{device} has", f" free{suggestion}"
    else:
        return  # a process that has used CUDA could not fork ranks; other devices do not report their memory
    layout = cache_layout(model.config, model.dtype)
    weights = num_ranks * sum(parameter.nbytes for parameter in model.parameters())
    cache = num_ranks * num_pages * layout.page_bytes * layout.group_size
    if weights + cache > there:
        where = f" on {num_ranks} ranks" if num_ranks > 1 else ""
        dtype = str(model.dtype).removeprefix("torch.")
        model_needs = f"the model needs {_gb(weights)}{where} in {dtype} and its cache {_gb(cache)}"
        raise ConfigError(f"{model_needs}, {machine_has} {_gb(there)}{suggestion}")


def container_limit(root: Path = _CGROUPS, of_process: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many bytes the control groups of this process let it use; infinity if there is no limit.

    root        the folder where the control groups are mounted
    of_process  the file that names the control groups of this process
    """
    limits = [float("inf")]
    with contextlib.suppress(OSError):
        for line in of_process.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            file = "memory.limit_in_bytes" if controllers else "memory.max"  # version 1 and 2
            top = root / "memory" if controllers else root
            if controllers and "memory" not in controllers.split(","):
                continue
            place = top / path.lstrip("/")
            for folder in (place, *place.parents):
                if folder == top.parent:
                    break
                with contextlib.suppress(OSError, ValueError):  # "max" is no number
                    limits.append(int((folder / file).read_text()))
    return min(limits)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def peak_rss() -> int:
    """Return the peak memory of this process in bytes; without /proc, the peak of its parent counts too."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # On Linux a child process inherits this value, in kilobytes. macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shortage(error: BaseException) -> str:
    """Return the first line of an out-of-memory or cache-exhausted error; "" for any other error."""
    text = str(error).partition("\n")[0]
    ran_out = isinstance(error, CacheExhausted | torch.OutOfMemoryError)
    if ran_out or (isinstance(error, RuntimeError) and any(words in text for words in _ALLOCATOR_WORDS)):
        return text
    return ""
