"""List the software that a rank has loaded (versions and libraries), and the environment variables that affect it.

The rank itself writes this list into the run's folder env/, because only the rank knows which libraries its process has
mapped. These can differ from the installed versions, and from the versions that torch was built with.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

_LIBRARIES = re.compile(
    r"/(lib(?:nccl|rccl|cudart|cublas|cudnn|nvshmem|gloo|mpi|torch_c(?:pu|uda)|triton)[^/]*\.so[^/]*)$"
)
_VARIABLES = (
    "HMR_KERNELS",
    "HMR_KERNEL_CHECKS",
    "HMR_NATIVE_ISA",
    "NCCL_",
    "TORCH_",
    "GLOO_",
    "CUDA_",
    "OMP_",
    "LD_PRELOAD",
    "VLLM_",
    "TRITON_",
)


def describe() -> str:
    """Return the software and variables as lines: "torch: 2.9.1 (…)", "module triton: 3.5.1", "NCCL_DEBUG=INFO".

    Ranks with the same software and variables have the same lines.
    """
    import torch

    lines = [
        f"python: {platform.python_version()} on {platform.platform()}",
        f"torch: {torch.__version__} (git {(torch.version.git_version or 'unknown')[:12]}, CUDA {torch.version.cuda})",
    ]
    if torch.cuda.is_available():
        nccl: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        lines.append(f"NCCL, as the library itself says: {'.'.join(map(str, nccl))}")
        lines += sorted({f"GPU: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())})
    lines += [f"module {name}: {version}" for name, version in _modules()]
    lines += [f"library: {name}" for name in _libraries()]
    lines += [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(_VARIABLES)]
    return "\n".join(lines) + "\n"


def _modules() -> list[tuple[str, str]]:
    """Return (name, ``__version__``) of each imported third-party package except torch."""
    versions = {}
    for name, module in list(sys.modules.items()):
        version = getattr(module, "__version__", None) if "." not in name and name != "torch" else None
        if isinstance(version, str) and "site-packages" in (getattr(module, "__file__", None) or ""):
            versions[name] = version
    return sorted(versions.items())


def _libraries() -> list[str]:
    """Return the file names of the communication and compute libraries that the process has mapped."""
    try:
        mapped = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return []
    return sorted({match.group(1) for line in mapped.splitlines() if (match := _LIBRARIES.search(line))})
