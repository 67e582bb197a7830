"""The cells of the experiment: a cell is one start of vLLM, with its settings and its command line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

JIT, TRITON, CPU = "jit", "triton", "cpu"
COLD, WARM = "cold", "warm"
TP, DP_EP, DP_EP_EAGER = "TP", "DP+EP", "DP+EP eager"

GDN_FLAGS = {JIT: "flashinfer", TRITON: "triton"}
"""Backend of a cell -> value of --gdn-prefill-backend. vLLM 0.20, 0.32 and 0.33 have this flag."""

MOE_FLAGS = {JIT: "flashinfer_cutlass", TRITON: "triton"}
"""Backend of a cell -> value of --moe-backend, in vLLM 0.20, 0.32 and 0.33.

Without this flag, vLLM chooses the backend. For block-FP8 on compute capability 9.0, it chooses flashinfer_cutlass with
expert parallelism, and triton without (model_executor/layers/fused_moe/oracle/fp8.py).
"""

REPORT_FLAGS = (
    "--trust-remote-code", "--language-model-only", "--gpu-memory-utilization", "0.90", "--max-model-len", "32768",
)  # fmt: skip
"""The flags that the three commands of vllm#41862 share."""

REPORT_MODEL = "Qwen/Qwen3.5-397B-A17B-FP8"
REPORT_VARIABLES = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@dataclass(frozen=True)
class Cell:
    """One start of vLLM.

    ranks   number of ranks of the server
    layout  TP, DP_EP or DP_EP_EAGER
    gdn     implementation of the GDN prefill: JIT (FlashInfer, which nvcc compiles), TRITON or CPU
    moe     implementation of the experts: JIT (FlashInfer's CUTLASS kernels), TRITON or CPU
    cache   COLD: the cache folder is empty; WARM: the cache folder is the one that the cold start filled
    """

    ranks: int
    layout: str
    gdn: str
    moe: str
    cache: str

    @property
    def name(self) -> str:
        """Return the name of the cell and of its files, such as "dp8ep8-jit-triton-cold"."""
        size = self.ranks
        layout = {TP: f"tp{size}", DP_EP: f"dp{size}ep{size}", DP_EP_EAGER: f"dp{size}ep{size}eager"}[self.layout]
        return f"{layout}-{self.gdn}-{self.moe}-{self.cache}"

    @property
    def pair(self) -> str:
        """Return this cell's name without "cold" or "warm". The other cell of the pair has the same."""
        return self.name.rpartition("-")[0]

    def words(self) -> tuple[str, str, str, str]:
        """Return layout, GDN backend, MoE backend and cache, as a table shows them."""
        size = self.ranks
        layout = {TP: f"TP{size}", DP_EP: f"DP{size}+EP{size}", DP_EP_EAGER: f"DP{size}+EP{size} eager"}[self.layout]
        return layout, self.gdn, self.moe, self.cache

    def flags(self) -> list[str]:
        """Return the flags of `vllm serve` that select this cell's number of ranks, layout and backends."""
        size = str(self.ranks)
        if self.layout == TP:
            flags = ["--tensor-parallel-size", size]
        else:
            flags = ["--data-parallel-size", size, "--enable-expert-parallel"]
        if self.layout == DP_EP_EAGER:
            flags.append("--enforce-eager")
        if self.gdn in GDN_FLAGS:
            flags += ["--gdn-prefill-backend", GDN_FLAGS[self.gdn]]
        if self.moe in MOE_FLAGS:
            flags += ["--moe-backend", MOE_FLAGS[self.moe]]
        return flags

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def all_cells(ranks: int, with_eager: bool, on_a_cpu: bool) -> list[Cell]:
    """Return all cells in the order of the experiment, also those that this machine cannot start.

    The first four cells are two of the three commands of the report vllm#41862, each cold and warm: the first command
    (EP with FlashInfer, which stalls) and the third (TP with Triton, which works). These cells matter most, so they
    come first, in case the experiment is stopped early. Each warm cell comes directly after its cold cell.

    ranks       number of ranks of each server
    with_eager  also return cells with the layout of the report's second command, which has --enforce-eager
    on_a_cpu    also return cells whose GDN prefill and experts run on a CPU
    """
    layouts = [DP_EP, *([DP_EP_EAGER] if with_eager else []), TP]
    jit, triton = (JIT, JIT), (TRITON, TRITON)
    first = [(DP_EP, *jit), (TP, *triton)]
    rest = itertools.product(layouts, (JIT, TRITON), (JIT, TRITON))
    of_a_cpu = [(layout, CPU, CPU) for layout in layouts] if on_a_cpu else []
    combined = dict.fromkeys([*first, *rest, *of_a_cpu])
    return [Cell(ranks, *parts, cache) for parts in combined for cache in (COLD, WARM)]


def matching(cells: Sequence[Cell], words: str) -> list[Cell]:
    """Return the cells whose words in the table include every word of ``words``, such as "DP8+EP8 jit cold".

    Only whole words are compared.
    """
    wanted = set(words.split())
    return [cell for cell in cells if wanted <= {part for word in cell.words() for part in word.split()}]
