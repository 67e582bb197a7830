"""A decided run that is judged again from its files has the verdict and the evidence of its verdict.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulated_watch import World, make_run_dir
from simulator import Simulation

from hybrid_moe_ref.parallel.observer import Collective
from repro.hosts.options import WatchOptions
from repro.store.run_dir import RunDir, write_json
from repro.watch.comparison import Comparison
from repro.watch.offline import judge_files

CALL = Collective("dp", "all_reduce", "step", (4,), "int32", "sum")


def watched(root: Path, programs: list[list[Any]], deadline_s: float = 20.0) -> World:
    """The world of two ranks, whose Flight Recorder has one collective pending on each rank that waits."""
    run_dir = make_run_dir(root)
    world = World(
        Simulation(programs, {"dp": [(0, 1)]}, folder=run_dir.root), run_dir, WatchOptions(2, 1.0, deadline_s), 1
    )

    def collect(run_dir: RunDir, pids: Mapping[int, int]) -> dict[int, str]:
        entry = {"process_group": ["", "dp"], "collective_seq_id": 2, "retired": False}
        write_json(run_dir.flight_recorder(0), {"entries": [entry]})
        return {1: "stack"}

    world.hosts[0].collect = collect  # type: ignore[method-assign]
    return world


def test_a_deadlock_keeps_its_confirmations_and_no_word_about_tokens_is_added(tmp_path: Path) -> None:
    world = watched(tmp_path, [[("call", CALL), ("call", CALL)], [("call", CALL)]])
    before = world.watch().run()
    assert before.verdict == "deadlock"
    assert "rank 0: the Flight Recorder has the same collective pending" in before.evidence
    assert "rank 1 left no stack within 0.7 s" in before.evidence
    again = judge_files(world.run_dir, world.options, Comparison(missing="no output of ranks 0,1 is there"))
    assert again.verdict.evidence == before.evidence and again.verdict.verdict == "deadlock"


def test_events_that_ranks_recorded_after_the_verdict_are_not_judged(tmp_path: Path) -> None:
    """At the deadline the ranks of other hosts go on until their agent sees the verdict."""
    step = [("call", CALL), ("sleep", 300 * 10**6)]
    world = watched(tmp_path, [step * 12, [("call", CALL), ("sleep", 3 * 10**9), *step * 11]], deadline_s=2.5)
    before = world.watch().run()
    assert (before.verdict, before.culprits) == ("slow", (1,))
    world.sim.run(world.sim.now_ns + 2 * 10**9)
    again = judge_files(world.run_dir, world.options, Comparison())
    assert (again.verdict.verdict, again.verdict.culprits, again.verdict.evidence) == ("slow", (1,), before.evidence)
    assert again.verdict.ranks[0].seq == before.ranks[0].seq and again.whole


def test_a_witness_that_no_longer_holds_the_judged_events_is_named_and_not_used(tmp_path: Path) -> None:
    step = [("call", CALL), ("sleep", 10**6)]
    world = watched(tmp_path, [step * 900, [("call", CALL), ("sleep", 3 * 10**9), *step * 899]], deadline_s=2.5)
    world.watch().run()
    world.sim.run(world.sim.now_ns + 20 * 10**9)
    again = judge_files(world.run_dir, world.options, Comparison())
    assert again.verdict.verdict == "inconclusive" and not again.whole and not again.verdict.culprits
    assert any(line.startswith("events/rank000.wit:0: does not hold the") for line in again.verdict.evidence)
