"""Start serve.py with the plug-ins of this project, which need not be installed in vLLM's environment."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GROUP = "vllm.general_plugins"


def command(vllm: Path, out: Path, waves: str, deadline_s: float = 400) -> list[str]:
    """The command that serves ``waves``, separated by blanks. vllm: a virtual environment with vLLM's CPU build."""
    program = [str(vllm / "bin" / "python"), str(HERE / "serve.py")]
    return [*program, "--out", str(out), "--deadline", str(deadline_s), "--waves", *waves.split()]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment in which vLLM finds the entry points of pyproject.toml, question.py, faults.py and overhead.py.

    folder: where their metadata is written, and the caches of vLLM and torch
    """
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    metadata = folder / "hmr_plugins-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hmr-plugins\nVersion: 0\n")
    kernels = folder / "hybrid_moe_kernels"  # the package that kernels/ is when it is installed
    if not kernels.is_symlink():
        kernels.symlink_to(ROOT / "kernels")
    points = {
        "hmr_question": "question:register",
        **points,
        "hmr_faults": "faults:register",
        "hmr_overhead": "overhead:register",
    }
    lines = [f"{name} = {value}" for name, value in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    # The folder comes first: a checkout may have metadata of its own (*.egg-info), which would load the recorder first.
    path = os.pathsep.join(map(str, (folder, ROOT, HERE)))
    caches = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return {**os.environ, **caches, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
