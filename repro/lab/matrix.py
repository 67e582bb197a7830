"""What of the report's commands makes a start slow: every combination of layout, backends and kernel cache.

    python -m repro matrix             run them, print one table and the phases of every rank
    python -m repro matrix --script    a shell script that does the same with vLLM on 8 GPUs

The kernels are compiled where a layer needs them first, as servers do. Two more rows give every rank a cache of its
own, of which rank 0's alone is cold, so that the others wait for it in a collective, and not for a lock: a patient
group waits until the build is done, one with a short timeout gives up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.hosts.interrupt import Interrupt
from repro.lab import job, kernel_cache, launch, scenarios
from repro.lab.settings import RunSettings
from repro.report.terminal import Display
from repro.store.run_dir import RunDir
from repro.trace.format import Kind
from repro.trace.witness import read

SHORT_TIMEOUT_S = 3.0
PHASES = ("load", "prepare", "profile", "capture", "serve")
"""Those that take time; the others are in the JSON."""


@dataclass(frozen=True)
class Cell:
    """One combination. ``configuration`` is config2 for DP8 + EP8, or tp8, both eager here."""

    configuration: str
    gdn: str
    moe: str
    cache: str
    group_timeout_s: float = 0.0

    @property
    def layout(self) -> str:
        return "TP8" if self.configuration == "tp8" else "DP8+EP8"

    def settings(self, document: Mapping[str, Any], flags: Mapping[str, Any]) -> RunSettings:
        """The run of this cell, as servers do it."""
        engine = {**document.get("engine", {}), "gdn_prefill_backend": self.gdn, "moe_backend": self.moe}
        mine = {"scenario": self.configuration, "variant": "fault", "kernel_cache": self.cache}
        timeout = {"group_timeout_s": self.group_timeout_s}
        return scenarios.settings_of({**flags, **mine, **timeout}, {**document, "engine": {"mode": "eager", **engine}})


def cells() -> list[Cell]:
    """All of them, for a CPU: the compiled experts are C++. For GPUs there is the script."""
    layouts, caches = ("tp8", "config2"), ("cold", "warm")
    found = [Cell(*parts) for parts in itertools.product(layouts, ("torch", "jit"), ("auto", "jit"), caches)]
    return [*found, Cell("config2", "jit", "jit", "split"), Cell("config2", "jit", "jit", "split", SHORT_TIMEOUT_S)]


def run(
    wanted: Sequence[tuple[Cell, RunSettings]],
    out: Path,
    interrupt: Interrupt,
    tell: Callable[[str], None],
    start: job.Start,
    done: Callable[[Path], None] = lambda root: None,
) -> list[dict[str, Any]]:
    """Run the cells one after another; each verdict with its cell and the seconds of each phase on each rank.

    done: called with each run directory once the run is over
    """
    documents: list[dict[str, Any]] = []
    references: dict[tuple[Any, ...], Path] = {}
    for number, (cell, settings) in enumerate(wanted, start=1):
        mine: dict[str, Any] = {
            "layout": cell.layout, "gdn_prefill_backend": cell.gdn, "moe_backend": cell.moe,
            "kernel_cache": cell.cache, "group_timeout_s": cell.group_timeout_s, "phases": [], "stalled_s": 0.0,
        }  # fmt: skip
        if not (missing := scenarios.load(settings.scenario).missing(settings)):
            known = references.get(settings.reference_key())
            try:
                run_dir, document = launch.run(settings, out, interrupt, Display(), start, known)
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
        tell(f"[{number}/{len(wanted)}] {name(document)}: {missing or document['verdict']}")
        if interrupt():
            break
    return documents


def phases(run_dir: RunDir, rank: int) -> dict[str, float]:
    """How many seconds a rank was in each phase, by its witness; the last one ends with its last event."""
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
    """A cell in words."""
    return " ".join(_cells_of(document))


def _cells_of(document: Mapping[str, Any]) -> list[str]:
    timeout = f"{document['group_timeout_s']:g} s" if document["group_timeout_s"] else "-"
    return [*(document[key] for key in ("layout", "gdn_prefill_backend", "moe_backend", "kernel_cache")), timeout]


def table(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each cell, with the longest time that a rank spent in each phase, and then every rank's."""
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
            continue  # it could not run here
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
    # Who compiles, and which lock files are there: the two things that no log line tells.
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
    """The shell script for real vLLM."""
    lines = []
    for layout, gdn, moe, cache in itertools.product(
        ("tp8", "dp8ep8", "dp8ep8eager"), ("triton", "flashinfer"), ("triton", "flashinfer_cutlass"), ("cold", "warm")
    ):
        lines.append(f"start {layout} {gdn} {moe} {cache}")
    return SCRIPT + "\n".join(lines) + "\n"
