"""When a verdict comes: one quiet window after the last event, unless a rank moves; and what is said until then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated_watch import World, make_run_dir
from simulator import Simulation

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.hosts.options import WatchOptions
from repro.watch.live import POLL_S

REDUCE = Collective("dp", "all_reduce", "", (32,), "int32", "sum")
GATHER = Collective("ep", "all_gather_v", "layers.0.mlp", (3, 1), "float32")
ENTRIES = tuple(ScheduleEntry(call.group, call.op, call.layer) for call in (REDUCE, GATHER))
BEGIN: list[Any] = [("phase", "serve"), ("step", 1, ENTRIES), ("call", REDUCE)]
QUIET_S, DEADLINE_S = 1.0, 60.0
SLACK_S = 4 * POLL_S  # the polls before and after the window, and the time that the evidence takes


def world_of(root: Path, programs: list[list[Any]], deadline_s: float = DEADLINE_S) -> World:
    run_dir = make_run_dir(root)
    everyone = tuple(range(len(programs)))
    sim = Simulation(programs, {"dp": [everyone], "ep": [everyone]}, folder=run_dir.root)
    return World(sim, run_dir, WatchOptions(len(programs), QUIET_S, deadline_s), 1)


def hung(root: Path) -> World:
    """Rank 1 leaves out the gather, and waits in the reduction after it."""
    return world_of(root, [[*BEGIN, ("call", GATHER)], [*BEGIN, ("call", REDUCE)]])


def test_a_hang_is_decided_once_it_has_lasted_the_quiet_window(tmp_path: Path) -> None:
    world = hung(tmp_path)
    document = world.watch().run()
    assert (document.verdict, document.culprits) == ("deadlock", (1,))
    assert QUIET_S < document.seconds.stall_to_verdict < QUIET_S + SLACK_S
    assert document.seconds.stall_to_verdict <= document.seconds.total < QUIET_S + 2 * SLACK_S
    assert world.hosts[0].asked == [{0: 100, 1: 101}] and not any("deadline" in line for line in document.evidence)


@pytest.mark.parametrize("times", [1, 3])
def test_a_rank_that_moves_while_its_evidence_is_collected_is_judged_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    world = hung(tmp_path)
    host = world.hosts[0]
    collect, moved = host.collect, []

    def collect_and_move(*arguments: Any) -> dict[int, str]:
        if len(moved) < times:
            moved.append(world.sim.now_ns)
            world.sim.recorders[0].wait(GATHER, 1)
        return collect(*arguments)

    monkeypatch.setattr(host, "collect", collect_and_move)
    world.watch().run()
    assert len(host.asked) == times + 1, "each verdict on ranks that moved is withdrawn, the next one stands"
    assert times * QUIET_S < (world.sim.now_ns - moved[0]) / 1e9 < times * (QUIET_S + 2 * SLACK_S)


def test_a_run_that_is_slow_is_watched_on_until_it_hangs_or_ends(tmp_path: Path) -> None:
    working_s = 5.0
    late = [*BEGIN, ("sleep", int(working_s * 1e9)), ("call", GATHER)]
    document = world_of(tmp_path / "ends", [[*BEGIN, ("call", GATHER)], late]).watch().run()
    assert (document.verdict, document.culprits) == ("slow", (1,))
    assert working_s < document.seconds.total < working_s + 2 * SLACK_S and document.seconds.stall_to_verdict < SLACK_S
    world = world_of(tmp_path / "hangs", [[*BEGIN, ("call", GATHER)], [*late[:-1], ("call", REDUCE)]])
    document = world.watch().run()
    assert (document.verdict, document.culprits) == ("deadlock", (1,))
    assert working_s + QUIET_S < document.seconds.total < working_s + QUIET_S + 3 * SLACK_S


def test_the_deadline_ends_a_watch_that_nothing_else_ends(tmp_path: Path) -> None:
    world = world_of(tmp_path, [[*BEGIN, ("call", GATHER)], [*BEGIN, ("spin",)]], deadline_s=7.0)
    document = world.watch().run()
    assert (document.verdict, document.culprits) == ("slow", (1,))
    assert "the deadline of 7 s passed" in document.evidence
    assert 7.0 < document.seconds.total < 7.0 + SLACK_S


def test_the_processor_time_of_the_second_half_of_a_silence_shows_who_works(tmp_path: Path) -> None:
    late = [*BEGIN, ("sleep", int(5e9)), ("call", GATHER)]
    said: list[str] = []
    document = world_of(tmp_path, [[*BEGIN, ("call", GATHER)], late]).watch(notice=said.append).run()
    assert any("rank 1 running" in line and "keeps 1.00 processors busy" in line for line in document.evidence)
    assert len(said) == 1 and "rank 1 runs outside any collective" in said[0], "a silence is reported once"


def test_a_display_sees_the_open_witnesses_at_each_poll(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    world = hung(tmp_path)
    world.watch(show=lambda tails: seen.append([tail.writer().rank for tail in tails])).run()
    assert seen and all(ranks == [0, 1] for ranks in seen)
    assert len(seen) == pytest.approx(world.sim.now_ns / 1e9 / POLL_S, abs=4)
