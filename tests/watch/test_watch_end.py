"""How a watch ends when no rank begins, or the results cannot be compared yet. All clocks are simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated_watch import World, make_run_dir
from simulator import Simulation

from hybrid_moe_ref.parallel.observer import Collective
from repro.hosts.options import WatchOptions
from repro.trace.witness.file import create
from repro.trace.witness.format import Identity
from repro.watch.comparison import Comparison
from repro.watch.offline import judge_files

CALL = Collective("dp", "all_reduce", "step", (4,), "int32", "sum")
OPTIONS = WatchOptions(num_ranks=2, quiet_window_s=1.0, deadline_s=4.0)


def finishing(root: Path) -> World:
    """Two ranks that are done after one collective."""
    run_dir = make_run_dir(root)
    programs = [[("call", CALL)], [("call", CALL)]]
    return World(Simulation(programs, {"dp": [(0, 1)]}, folder=run_dir.root), run_dir, OPTIONS, 1)


def test_ranks_that_never_began_are_reported_with_the_last_error_of_their_launcher(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path)
    for rank in range(2):
        create(run_dir.witness(rank), Identity(rank, 2))
    run_dir.launcher_log.write_text("starting\nImportError: libcudart.so.12: cannot open\nexit\n")
    world = World(Simulation([[], []], {"dp": [(0, 1)]}), run_dir, OPTIONS, 1)
    document = world.watch(job_alive=lambda: False).run()
    line = "ranks 0,1 never began: logs/launcher.log says ImportError: libcudart.so.12: cannot open"
    assert document.verdict == "crash" and not document.culprits and line in document.evidence, document.evidence
    again = judge_files(run_dir, OPTIONS, Comparison())
    assert (again.verdict.verdict, again.verdict.evidence) == ("crash", document.evidence)


@pytest.mark.parametrize("missing", ["", "the single-process reference is not ready"])
def test_a_comparison_that_is_not_ready_is_asked_for_until_the_deadline(tmp_path: Path, missing: str) -> None:
    world = finishing(tmp_path)
    asked: list[bool] = []

    def compare(final: bool) -> Comparison | None:
        asked.append(final)
        return Comparison(missing=missing, evidence="" if missing else "4 tokens are equal") if final else None

    document = world.watch(compare=compare).run()
    assert asked[-1] and len(asked) > 10 and not any(asked[:-1])
    assert document.verdict == ("inconclusive" if missing else "clean"), document.evidence
    assert "the deadline of 4 s passed" in document.evidence
    line = f"{missing}, so the tokens were not compared" if missing else "4 tokens are equal"
    assert line in document.evidence


def test_a_watch_of_finished_ranks_knows_their_processes_until_they_exit(tmp_path: Path) -> None:
    world = finishing(tmp_path)
    watch = world.watch()
    assert watch.run().verdict == "clean" and watch.all_done()
    assert [process.pid for process in watch.processes()] == [100, 101] and not watch.remote_ranks_run()


def test_a_rank_that_is_done_may_exit_before_the_others_are_done(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path)
    programs = [[("call", CALL)], [("call", CALL), ("sleep", 3 * 10**9)]]
    sim = Simulation(programs, {"dp": [(0, 1)]}, folder=run_dir.root)
    world = World(sim, run_dir, WatchOptions(num_ranks=2, quiet_window_s=10.0, deadline_s=30.0), 1)

    def exit_when_done(tails: object) -> None:
        if sim.ranks[0].state == "done":
            sim.ranks[0].state = "dead"

    document = world.watch(show=exit_when_done).run()
    assert (document.verdict, document.culprits) == ("clean", ()), document.evidence


@pytest.mark.parametrize(
    ("num_ranks", "waits_for", "starved", "late_s", "verdict"),
    [
        (2, "collective", 0.0, 0.0, "slow"),
        (2, "lock", 0.0, 0.0, "slow"),
        (4, "collective", 0.3, 0.0, "slow"),
        (4, "lock", 0.0, 0.02, "slow"),  # the watcher is woken late: it cannot tell who else lacks a processor
        (4, "collective", 0.9, 0.0, "clean"),
    ],
)
def test_a_run_that_one_rank_held_up_is_slow_also_with_two_ranks_and_on_a_busy_machine(
    tmp_path: Path, num_ranks: int, waits_for: str, starved: float, late_s: float, verdict: str
) -> None:
    """The last rank works for 5 s, in which the others wait for it in a collective or for its lock."""
    run_dir = make_run_dir(tmp_path)
    works: list[Any] = [("call", CALL), ("sleep", 5 * 10**9), ("call", CALL)]
    waits: list[Any] = [("call", CALL), ("call", CALL)]
    if waits_for == "lock":
        works = [("call", CALL), ("lock", "k"), ("build", "gdn", 5 * 10**9), ("built", "gdn"), ("unlock", "k")]
        waits = [("call", CALL), ("sleep", 10**8), ("lock", "k"), ("unlock", "k")]
    sim = Simulation([waits] * (num_ranks - 1) + [works], {"dp": [tuple(range(num_ranks))]}, folder=run_dir.root)
    options = WatchOptions(num_ranks=num_ranks, quiet_window_s=1.0, deadline_s=60.0)
    world = World(sim, run_dir, options, 1)
    world.hosts[0].starved, world.hosts[0].late_s = starved, late_s
    document = world.watch().run()
    assert document.verdict == verdict, document.evidence
    assert document.culprits == ((num_ranks - 1,) if verdict == "slow" else ()), document.evidence


@pytest.mark.parametrize(("every_s", "verdict"), [(0.7, "clean"), (4.5, "slow")])
def test_a_run_that_a_rank_held_up_while_it_gave_signs_of_life_in_every_quiet_window_is_not_slow(
    tmp_path: Path, every_s: float, verdict: str
) -> None:
    """The last rank works for 9 s, and the others wait for it."""
    run_dir = make_run_dir(tmp_path)
    beats = [("heartbeat", "loading"), ("sleep", int(every_s * 1e9))] * int(9 / every_s)
    programs: list[Any] = [[("call", CALL), ("call", CALL)]] * 3 + [[("call", CALL), *beats, ("call", CALL)]]
    sim = Simulation(programs, {"dp": [tuple(range(4))]}, folder=run_dir.root)
    world = World(sim, run_dir, WatchOptions(num_ranks=4, quiet_window_s=1.0, deadline_s=60.0), 1)
    document = world.watch().run()
    assert document.verdict == verdict, document.evidence
