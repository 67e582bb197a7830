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

from repro.lab import scenarios
from repro.lab.settings import RunSettings
from repro.lab.start.series import Series
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
    series: Series,
    say: Callable[[str], None],
    done: Callable[[Path], None] = lambda root: None,
) -> list[dict[str, Any]]:
    """Run the cells one after another; return each verdict with its cell and each rank's seconds per phase.

    say: called with a line for each cell
    done: called with each run directory once the run is over
    """
    documents: list[dict[str, Any]] = []
    for number, (cell, settings) in enumerate(chosen, start=1):
        run_dir, document = series.run(settings)
        document |= {
            "layout": cell.layout, "gdn_prefill_backend": cell.gdn, "moe_backend": cell.moe,
            "kernel_cache": cell.cache, "group_timeout_s": cell.group_timeout_s, "phases": [],
            "stalled_s": document["quiet_s"] if document["verdict"] == "slow" else 0.0,
        }  # fmt: skip
        if run_dir:
            document["phases"] = [phases(run_dir, rank) for rank in range(settings.num_ranks)]
            done(run_dir.root)
        documents.append(document)
        say(f"[{number}/{len(chosen)}] {name(document)}: {document.get('skipped') or document['verdict']}")
        if series.interrupt():
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


def script() -> str:
    """The shell script that runs the matrix with vLLM."""
    return (Path(__file__).parent / "vllm_matrix.sh").read_text()
