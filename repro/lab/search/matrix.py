"""Find which part of the report's commands makes a start slow: run every combination of layout, backends and cache.

    python -m repro matrix             run them, print one table and the phases of every rank
    python -m repro matrix --script    a shell script that does the same with vLLM on 8 GPUs

Kernels are compiled when a layer first needs them, as in servers. In two more rows every rank has its own kernel cache
and only rank 0's is cold, so that the others wait for rank 0 in a collective and not for a lock. With a long group
timeout they wait until the build is done; with a short one they give up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.hosts.interrupt import Interrupt
from repro.lab import scenarios
from repro.lab.settings import RunSettings
from repro.lab.start import job, kernel_cache, launch
from repro.report.terminal import Display
from repro.store.run_dir import RunDir
from repro.trace.format import Kind
from repro.trace.witness import read

SHORT_TIMEOUT_S = 3.0
PHASES = ("load", "prepare", "profile", "capture", "serve")
"""The phases in the table: those that take time. The JSON has all phases."""


@dataclass(frozen=True)
class Cell:
    """One combination. ``configuration`` is config2 (DP8 + EP8) or tp8; both run eagerly here."""

    configuration: str
    gdn: str
    moe: str
    cache: str
    group_timeout_s: float = 0.0

    @property
    def layout(self) -> str:
        return "TP8" if self.configuration == "tp8" else "DP8+EP8"

    def settings(self, document: Mapping[str, Any], flags: Mapping[str, Any]) -> RunSettings:
        """The settings of this cell's run, always the variant "fault": servers compile at first use."""
        engine = {**document.get("engine", {}), "gdn_prefill_backend": self.gdn, "moe_backend": self.moe}
        mine = {"scenario": self.configuration, "variant": "fault", "kernel_cache": self.cache}
        timeout = {"group_timeout_s": self.group_timeout_s}
        return scenarios.settings_of({**flags, **mine, **timeout}, {**document, "engine": {"mode": "eager", **engine}})


def cells() -> list[Cell]:
    """All cells. They run on a CPU, because the compiled experts are C++; the script is for GPUs."""
    layouts, caches = ("tp8", "config2"), ("cold", "warm")
    combined = [Cell(*parts) for parts in itertools.product(layouts, ("torch", "jit"), ("auto", "jit"), caches)]
    return [*combined, Cell("config2", "jit", "jit", "split"), Cell("config2", "jit", "jit", "split", SHORT_TIMEOUT_S)]


def run(
    chosen: Sequence[tuple[Cell, RunSettings]],
    out: Path,
    interrupt: Interrupt,
    say: Callable[[str], None],
    start: job.Start,
    done: Callable[[Path], None] = lambda root: None,
) -> list[dict[str, Any]]:
    """Run the cells one after another; return each verdict with its cell and each rank's seconds per phase.

    say: called with a line for each cell
    done: called with each run directory once the run is over
    """
    documents: list[dict[str, Any]] = []
    references: dict[tuple[Any, ...], Path] = {}
    for number, (cell, settings) in enumerate(chosen, start=1):
        mine: dict[str, Any] = {
            "layout": cell.layout, "gdn_prefill_backend": cell.gdn, "moe_backend": cell.moe,
            "kernel_cache": cell.cache, "group_timeout_s": cell.group_timeout_s, "phases": [], "stalled_s": 0.0,
        }  # fmt: skip
        if not (missing := scenarios.load(settings.scenario).missing(settings)):
            reference = references.get(settings.reference_key())
            try:
                run_dir, document = launch.run(settings, out, interrupt, Display(), start, reference)
            except kernel_cache.CannotFill as error:
                missing = str(error)
        if missing:
            document = launch.skipped(settings, missing) | mine
        else:
            references.setdefault(settings.reference_key(), run_dir.reference)
            document |= mine | {"phases": [phases(run_dir, rank) for rank in range(settings.num_ranks)]}
            if document["verdict"] == "slow":
                document["stalled_s"] = document["quiet_s"]
            done(run_dir.root)
        documents.append(document)
        say(f"[{number}/{len(chosen)}] {name(document)}: {missing or document['verdict']}")
        if interrupt():
            break
    return documents


def phases(run_dir: RunDir, rank: int) -> dict[str, float]:
    """The seconds that a rank spent in each phase, from its witness. The last phase ends with the rank's last event."""
    witness = read(run_dir.witness(rank))
    seconds: dict[str, float] = {}
    begun: tuple[str, int] | None = None
    for event in witness.events():
        if begun is not None and event.kind in (Kind.PHASE, Kind.DONE, Kind.FAILED):
            seconds[begun[0]] = round(seconds.get(begun[0], 0.0) + (event.t_ns - begun[1]) / 1e9, 3)
            begun = None
        if event.kind == Kind.PHASE:
            begun = (witness.text(event.phase), event.t_ns)
    if begun is not None:
        seconds[begun[0]] = round(seconds.get(begun[0], 0.0) + (witness.last_event_ns() - begun[1]) / 1e9, 3)
    return seconds


def name(document: Mapping[str, Any]) -> str:
    """The name of a cell: its values, separated by spaces."""
    return " ".join(_cells_of(document))


def _cells_of(document: Mapping[str, Any]) -> list[str]:
    timeout = f"{document['group_timeout_s']:g} s" if document["group_timeout_s"] else "-"
    return [*(document[key] for key in ("layout", "gdn_prefill_backend", "moe_backend", "kernel_cache")), timeout]


def table(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the table: a row per cell with the longest time of any rank per phase, then the times per rank."""
    head = ("layout", "gdn", "moe", "cache", "timeout", "verdict", "seconds", "silent", *PHASES, "as expected")
    rows: list[tuple[str, ...]] = [head]
    for document in documents:
        longest = [max((rank.get(phase, 0.0) for rank in document["phases"]), default=0.0) for phase in PHASES]
        rows.append((
            *_cells_of(document),
            ", ".join(filter(None, (document["verdict"], document["cause"]))),
            f"{document['seconds']['total']:.1f}",
            f"{document['stalled_s']:.1f}" if document["stalled_s"] else "-",
            *(f"{seconds:.1f}" for seconds in longest),
            "yes" if document["matches_expected"] else "NO",
        ))  # fmt: skip
    lines = _aligned(rows, range(6, 8 + len(PHASES)))
    for document in documents:
        ranks = document["phases"]
        if not ranks:
            continue  # this cell could not run here
        lines += ["", f"{name(document)}: seconds in each phase, ranks 0 to {len(ranks) - 1}"]
        names = dict.fromkeys(phase for rank in ranks for phase in rank if rank[phase] >= 0.05)
        rows = [(phase, *(f"{rank.get(phase, 0.0):.1f}" for rank in ranks)) for phase in names]
        lines += _aligned(rows, range(1, 1 + len(ranks)))
    return lines


def _aligned(rows: Sequence[Sequence[str]], numbers: range) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


SCRIPT = r"""#!/bin/bash
# The matrix of `python -m repro matrix` with vLLM on one host with 8 GPUs: which of layout, kernel backends and kernel
# cache makes the start of vllm#41862 stall. Written from the documentation; NOT RUN by this project, which has no such
# host. Check the flags with `vllm serve --help=all` first: --gdn-prefill-backend and --moe-backend as of vLLM 0.20.
#
#   bash matrix.sh [SECONDS]     how long a start may take before its processes are ended (default 1800)
#
# For every start: RESULTS/NAME.log with a time on each line, NAME.stacks (py-spy, if it is there) when it did not come
# up, and a line of RESULTS/summary.tsv. Each cold start has empty caches; its warm twin finds what the cold one left.
set -u
LIMIT=${1:-1800}
MODEL=${MODEL:-Qwen/Qwen3.5-397B-A17B-FP8}
PORT=${PORT:-8123}
RESULTS=${RESULTS:-matrix-$(date -u +%Y%m%dT%H%M%SZ)}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
printf 'layout\tgdn\tmoe\tcache\tup\tseconds\n' > "$RESULTS/summary.tsv"

COMMON=(--trust-remote-code --language-model-only --gpu-memory-utilization 0.90 --max-model-len 32768 --port "$PORT")
TP8=(--tensor-parallel-size 8)
DP8EP8=(--data-parallel-size 8 --enable-expert-parallel)  # the report's first command; its second adds --enforce-eager

start() {  # layout gdn moe cache
  local name="$1-$2-$3-$4" layout=("${TP8[@]}") caches="$RESULTS/caches-$1-$2-$3" begun=$SECONDS up=no
  [ "$1" = dp8ep8 ] && layout=("${DP8EP8[@]}")
  [ "$1" = dp8ep8eager ] && layout=("${DP8EP8[@]}" --enforce-eager)
  [ "$4" = cold ] && rm -rf "$caches"
  mkdir -p "$caches"
  # Lines that vLLM logs "once" come from local rank 0 alone: that others do not print them means nothing.
  FLASHINFER_WORKSPACE_BASE="$caches" TRITON_CACHE_DIR="$caches/triton" TORCHINDUCTOR_CACHE_DIR="$caches/inductor" \
  TORCH_EXTENSIONS_DIR="$caches/extensions" VLLM_CACHE_ROOT="$caches/vllm" \
  VLLM_USE_DEEP_GEMM=0 VLLM_WORKER_MULTIPROC_METHOD=spawn VLLM_LOGGING_LEVEL=DEBUG \
  setsid vllm serve "$MODEL" "${layout[@]}" --gdn-prefill-backend "$2" --moe-backend "$3" "${COMMON[@]}" \
    > >(while IFS= read -r line; do printf '%(%H:%M:%S)T %s\n' -1 "$line"; done > "$RESULTS/$name.log") 2>&1 &
  local group=$!
  while kill -0 "$group" 2>/dev/null && [ $((SECONDS - begun)) -lt "$LIMIT" ]; do
    if curl -sf "http://127.0.0.1:$PORT/health" > /dev/null; then up=yes; break; fi
    # Which processes compile, and which lock files exist: no log line shows either.
    { date -u +%H:%M:%S; pgrep -ag "$group" 'nvcc|cicc|ninja|ptxas' | cut -c1-160 | head -5
      find "$caches" -name '*.lock' -o -name lock; } >> "$RESULTS/$name.builds" 2> /dev/null
    sleep 5
  done
  if [ "$up" = no ] && command -v py-spy > /dev/null; then
    for pid in $(pgrep -g "$group"); do echo "== $pid"; py-spy dump --pid "$pid"; done > "$RESULTS/$name.stacks" 2>&1
  fi
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$up" $((SECONDS - begun)) | tee -a "$RESULTS/summary.tsv"
  kill -TERM -- "-$group" 2>/dev/null
  sleep 15
  kill -KILL -- "-$group" 2>/dev/null
  wait "$group" 2>/dev/null
}

"""


def script() -> str:
    """The shell script that runs the matrix with vLLM."""
    lines = []
    for layout, gdn, moe, cache in itertools.product(
        ("tp8", "dp8ep8", "dp8ep8eager"), ("triton", "flashinfer"), ("triton", "flashinfer_cutlass"), ("cold", "warm")
    ):
        lines.append(f"start {layout} {gdn} {moe} {cache}")
    return SCRIPT + "\n".join(lines) + "\n"
