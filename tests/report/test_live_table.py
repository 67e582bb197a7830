"""The live table: the phase and the place of each rank, and for how long, at a start of a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live
from scene import MS
from simulated_watch import make_run_dir
from simulator import Simulation

from hybrid_moe_ref.parallel.observer import Collective
from repro.report.live_table import MOST_ROWS, LiveTable
from repro.report.tables import lines
from repro.store.run_dir import RunDir
from repro.trace.witness.file import Tail, create
from repro.trace.witness.format import Identity

CALL = Collective("dp", "all_reduce", "step", (4,), "int32", "sum")
SECOND = 1000 * MS
HERE = Identity(0, 1, hostname="host0", boot_id="boot0", wall_offset_ns=10**18 - 10**16)
WAITING = [("phase", "load"), ("sleep", 20 * SECOND), ("phase", "compile"), ("call", CALL)]
BUILDING = [("phase", "load"), ("sleep", 21 * SECOND), ("phase", "compile"), ("lock", "gdn.lock"),
            ("build", "extension gdn", 90 * SECOND), ("call", CALL)]  # fmt: skip


def table_of(run_dir: RunDir, sim: Simulation) -> list[list[str]]:
    """The cells of the table's rows, without its title."""
    table = LiveTable("title", Live(console=Console()), HERE, now_ns=lambda: sim.now_ns + 10**16)
    tails = [Tail(path) for path in sorted(run_dir.root.glob("events/*.wit"))]
    return [[part.strip() for part in line.split("  ") if part.strip()] for line in lines(table.draw(tails))[1:]]


def simulated(root: Path, programs: list[list[tuple]], until_s: float, **options) -> tuple[RunDir, Simulation]:
    run_dir = make_run_dir(root)
    sim = Simulation(programs, {"dp": [tuple(range(len(programs)))]}, folder=run_dir.root, **options)
    sim.run(int(until_s * SECOND))
    return run_dir, sim


def test_the_phases_of_a_start_and_the_rank_that_builds_stand_in_the_table(tmp_path):
    run_dir, sim = simulated(tmp_path, [WAITING, BUILDING, WAITING], until_s=62)
    assert table_of(run_dir, sim) == [
        ["rank", "phase", "for", "step", "where", "for"],
        ["0", "compile", "42 s", "-", "waits in dp all_reduce #1 step", "42 s"],
        ["1", "compile", "41 s", "-", "builds extension gdn, holds lock gdn.lock.0", "41 s"],
        ["2", "compile", "42 s", "-", "waits in dp all_reduce #1 step", "42 s"],
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_times_of_a_rank_on_another_host_are_by_the_clock_of_that_host(tmp_path, seed):
    run_dir, sim = simulated(tmp_path, [WAITING, WAITING], until_s=62, hosts=2, seed=seed)
    assert abs(sim.skews_ns[1]) > 1000 * SECOND, seed
    assert {row[2] for row in table_of(run_dir, sim)[1:]} <= {"41 s", "42 s"}, (seed, table_of(run_dir, sim))


def test_a_rank_without_a_witness_has_a_row_and_the_others_keep_their_numbers(tmp_path):
    run_dir, sim = simulated(tmp_path, [WAITING, WAITING, WAITING], until_s=5)
    run_dir.witness(0).unlink()
    run_dir.witness(2).unlink()
    create(run_dir.witness(2), Identity(2, 3))  # made by a launcher, not opened by its rank
    assert table_of(run_dir, sim)[1:] == [
        ["0", "-", "-", "-", "not started", "-"],
        ["1", "load", "5.0 s", "-", "computing", "5.0 s"],
        ["2", "-", "-", "-", "not started", "-"],
    ]


@pytest.mark.parametrize("num_ranks", [MOST_ROWS, MOST_ROWS + 1])
def test_more_ranks_than_a_terminal_has_lines_share_the_rows_of_their_places(tmp_path, num_ranks):
    run_dir, sim = simulated(tmp_path, [WAITING] * (num_ranks - 1) + [BUILDING], until_s=62)
    rows = table_of(run_dir, sim)[1:]
    if num_ranks <= MOST_ROWS:
        assert [row[0] for row in rows] == list(map(str, range(num_ranks)))
    else:
        assert [row[0] for row in rows] == [f"0-{num_ranks - 2}", str(num_ranks - 1)]
        assert rows[0][1:3] == ["compile", "42 s"] and rows[1][4].startswith("builds extension gdn"), rows
