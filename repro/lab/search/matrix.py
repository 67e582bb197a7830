"""Find which part of the commands of vllm#41862 makes a start slow: run all combinations of layout, backends and cache.

`python -m repro matrix` runs the combinations, and prints one table and the phases of every rank. `python -m repro
cells` does the same with vLLM.

Kernels are compiled when a layer first needs them, as in servers. In the last two rows of the table every rank has its
own kernel cache, and only the cache of rank 0 is cold. So all other ranks wait for rank 0 in a collective, not for a
lock. In one of these two rows the group timeout is long, and the ranks wait until the build is done. In the other row
the group timeout is short, and the ranks give up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from repro.lab import scenarios
from repro.lab.settings import RunSettings
from repro.lab.start.series import Series
from repro.report.tables import make_table
from repro.store.run_dir import RunDir
from repro.store.schema import to_json
from repro.trace.witness.file import read
from repro.trace.witness.format import Kind
from repro.watch.document import Document

SHORT_TIMEOUT_S = 3.0
PHASES = ("load", "prepare", "profile", "capture", "serve")
"""The phases that the table shows, because they take the most time. The JSON has all phases."""


@dataclass(frozen=True)
class Cell:
    """One start of the server, with one combination of layout, kernel backends, kernel cache and group timeout.

    configuration    the scenario with this layout: "config2" (DP8 + EP8) or "tp8"; both run without graphs here
    gdn, moe         the kernel backends: "jit" is compiled at first use, the other values are not
    cache            the state of the kernel cache at the start: "cold", "warm" or "split"
    group_timeout_s  seconds after which a collective gives up; 0 means long after the deadline of the run
    """

    configuration: str
    gdn: str
    moe: str
    cache: str
    group_timeout_s: float = 0.0

    @property
    def layout(self) -> str:
        return "TP8" if self.configuration == "tp8" else "DP8+EP8"

    def values(self) -> tuple[str, ...]:
        """Return layout, backends, cache and group timeout as text, for a row of the table."""
        timeout = f"{self.group_timeout_s:g} s" if self.group_timeout_s else "-"
        return self.layout, self.gdn, self.moe, self.cache, timeout

    def name(self) -> str:
        """Return the values of the cell, separated by spaces."""
        return " ".join(self.values())

    def settings(self, document: Mapping[str, Any], flags: Mapping[str, Any]) -> RunSettings:
        """Return the settings of this cell's run.

        The variant is always "fault", in which kernels are compiled at their first use, as in servers.

        document: the content of the user's --config file
        flags: the values of the user's flags, by the setting's name: {"num_ranks": 4}
        """
        engine = {**document.get("engine", {}), "gdn_prefill_backend": self.gdn, "moe_backend": self.moe}
        mine = {"scenario": self.configuration, "variant": "fault", "kernel_cache": self.cache}
        timeout = {"group_timeout_s": self.group_timeout_s}
        return scenarios.settings_of({**flags, **mine, **timeout}, {**document, "engine": {"mode": "eager", **engine}})


def cells() -> list[Cell]:
    """Return all cells that the matrix runs. They run on the CPU, because the compiled experts are C++ code."""
    layouts, caches = ("tp8", "config2"), ("cold", "warm")
    combined = [Cell(*parts) for parts in itertools.product(layouts, ("torch", "jit"), ("auto", "jit"), caches)]
    return [*combined, Cell("config2", "jit", "jit", "split"), Cell("config2", "jit", "jit", "split", SHORT_TIMEOUT_S)]


@dataclass(frozen=True)
class Result:
    """The result of a cell (one start of the server): the verdict, and how long the phases of the start took.

    phases    for each rank, a dict from phase to seconds; () if this machine cannot run the cell
    """

    cell: Cell
    verdict: Document
    phases: tuple[Mapping[str, float], ...] = ()

    @property
    def stalled_s(self) -> float:
        """Return for how many seconds no rank recorded an event; 0 if the verdict is not `slow`."""
        return self.verdict.quiet_s if self.verdict.verdict == "slow" else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields of verdict.json, the fields of the cell, and the times."""
        cell = self.cell
        return {
            **to_json(self.verdict), "layout": cell.layout, "gdn_prefill_backend": cell.gdn,
            "moe_backend": cell.moe, "kernel_cache": cell.cache, "group_timeout_s": cell.group_timeout_s,
            "phases": list(self.phases), "stalled_s": self.stalled_s,
        }  # fmt: skip


def run(
    chosen: Sequence[tuple[Cell, RunSettings]],
    series: Series,
    say: Callable[[str], None],
    done: Callable[[Path], None] = lambda root: None,
) -> list[Result]:
    """Run the cells one after another, each with its settings.

    series  makes the runs, all with one launcher
    say     called after each cell, with a line that has its verdict
    done    called after each run, with the run directory
    """
    results: list[Result] = []
    for number, (cell, settings) in enumerate(chosen, start=1):
        run_dir, document = series.run(settings)
        seconds = [phases(run_dir, rank) for rank in range(settings.num_ranks)] if run_dir else ()
        if run_dir:
            done(run_dir.root)
        results.append(Result(cell, document, tuple(seconds)))
        say(f"[{number}/{len(chosen)}] {cell.name()}: {document.skipped or document.verdict}")
        if series.interrupt():
            break
    return results


def phases(run_dir: RunDir, rank: int) -> dict[str, float]:
    """Return a dict from phase to the seconds that a rank spent in it, from the rank's witness.

    A phase ends when the next phase begins, or the rank is done or fails. If the rank hangs in a phase, this phase ends
    with the rank's last event.
    """
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


def tables(results: Sequence[Result]) -> Iterator[tuple[str, Table]]:
    """Yield (title, table) pairs: first a table with a row for each cell, then for each cell a table of phases by rank.

    In the first table, the time of a phase is the longest time that any rank spent in this phase.
    """
    yield f"{len(results)} cells, seconds", _table_of_cells(results)
    for result in results:
        if result.phases:
            last = len(result.phases) - 1
            yield f"{result.cell.name()}: seconds in each phase, ranks 0 to {last}", _table_of_phases(result.phases)


def _table_of_cells(results: Sequence[Result]) -> Table:
    numbers = ("seconds", "silent", *PHASES)
    table = make_table("layout", "gdn", "moe", "cache", "timeout", "verdict", *numbers, "as expected", right=numbers)
    for result in results:
        verdict = result.verdict
        longest = [max((rank.get(phase, 0.0) for rank in result.phases), default=0.0) for phase in PHASES]
        table.add_row(
            *result.cell.values(),
            ", ".join(filter(None, (verdict.verdict, verdict.cause))),
            f"{verdict.seconds.total:.1f}",
            f"{result.stalled_s:.1f}" if result.stalled_s else "-",
            *(f"{seconds:.1f}" for seconds in longest),
            "yes" if verdict.matches_expected else "NO",
        )
    return table


def _table_of_phases(ranks: Sequence[Mapping[str, float]]) -> Table:
    columns = [str(rank) for rank in range(len(ranks))]
    table = make_table("phase", *columns, right=columns, header=False)
    for phase in dict.fromkeys(phase for rank in ranks for phase in rank if rank[phase] >= 0.05):
        table.add_row(phase, *(f"{rank.get(phase, 0.0):.1f}" for rank in ranks))
    return table
