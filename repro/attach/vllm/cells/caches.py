"""The cache folders of compiled kernels, one for each pair of a cold and a warm start.

A cold start gets a new, empty folder, so it finds no compiled kernels. The warm start with the same layout and backends
gets the folder that the cold start filled. The user's own caches do not change. The experiment removes only folders
that it made.
"""

from __future__ import annotations

import shutil
from pathlib import Path

VARIABLES = {
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",  # modules that nvcc compiled, and lock files
    "VLLM_CACHE_ROOT": "vllm",  # torch.compile; vLLM puts Inductor's cache beneath it
    "TORCHINDUCTOR_CACHE_DIR": "inductor",  # what torch compiles outside vLLM's cache
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",  # torch's C++ and CUDA extensions, and lock files
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "CUDA_CACHE_PATH": "cuda",  # PTX that the driver has compiled
}
"""Environment variable -> name of its folder inside the cache folder of a pair.

vLLM 0.20 to 0.33, FlashInfer, torch, Triton, DeepGEMM and CUDA read these variables.
"""

UNSET = ("VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR", "VLLM_DISABLE_COMPILE_CACHE", "TRITON_HOME")
"""Variables with which a server would use other caches or none. They are not in the server's environment."""

MARK = ".made-by-repro-cells"


def make(root: Path, pair: str) -> Path:
    """Make a new, empty cache folder below ``root`` for a cold start. Raises OSError.

    pair: the cell's name without "cold" or "warm", such as "dp8ep8-jit-triton". The folder gets this name, with a
    number after it if the name is taken
    """
    for number in range(1, 1000):
        folder = root / (pair if number == 1 else f"{pair}.{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # left by a start that was interrupted
            continue
        (folder / MARK).touch()
        for name in VARIABLES.values():
            (folder / name).mkdir()
        return folder
    raise FileExistsError(f"{root} already has 999 cache folders for {pair}: remove some of them")


def environment(folder: Path, environ: dict[str, str]) -> dict[str, str]:
    """Return ``environ``, changed so that a server with this environment keeps its caches in ``folder``."""
    kept = {name: value for name, value in environ.items() if name not in UNSET}
    return {**kept, **{name: str(folder / part) for name, part in VARIABLES.items()}}


def remove(folder: Path) -> None:
    """Remove a cache folder if :func:`make` made it. Leave any other folder."""
    if (folder / MARK).is_file() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
