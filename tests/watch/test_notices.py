"""The notice about ranks that wait for one that builds comes within 5 s, however often the builder records events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scene import MS
from simulated_watch import World, make_run_dir
from simulator import Simulation

from hybrid_moe_ref.parallel.observer import Collective
from repro.hosts.options import WatchOptions
from repro.verdict import Verdict
from repro.verdict.result import Position, Wait
from repro.watch.notices import REPEAT_S, Notices

CALL = Collective("dp", "all_reduce", "step", (4,), "int32", "sum")
SECOND = 1000 * MS
OPTIONS = WatchOptions(num_ranks=4, quiet_window_s=5.0, deadline_s=90.0)


def notices_of(root: Path, programs: list[list[tuple[Any, ...]]]) -> list[tuple[float, str]]:
    """Watch these ranks; returns the time of each notice in seconds, and its text."""
    run_dir = make_run_dir(root)
    sim = Simulation(programs, {"dp": [(0, 1, 2, 3)]}, folder=run_dir.root)
    world = World(sim, run_dir, OPTIONS, 1)
    noticed: list[tuple[float, str]] = []
    document = world.watch(notice=lambda text: noticed.append((sim.now_ns / 1e9, text))).run()
    assert document.verdict in ("clean", "slow"), document.evidence
    return noticed


def kernels(number: int, each_s: float) -> list[tuple[Any, ...]]:
    """Build so many kernels, one after another."""
    names = [f"Triton kernel gdn_{index}" for index in range(number)]
    return [step for name in names for step in (("build", name, int(each_s * SECOND)), ("built", name))]


@pytest.mark.parametrize("builds", [kernels(1, 8), kernels(26, 1.3)], ids=["one_build", "many_short_ones"])
def test_ranks_that_wait_in_a_collective_are_told_within_5_s_who_builds_what(tmp_path: Path, builds: Any) -> None:
    waiting = [("phase", "compile"), ("call", CALL)]
    noticed = notices_of(tmp_path, [waiting, waiting, [("phase", "compile"), *builds, ("call", CALL)], waiting])
    first_s, text = noticed[0]
    assert first_s < 5.0, noticed
    assert text.startswith("slow: ranks 0,1,3 wait in dp all_reduce #1 (compile, step) for 3 s; rank 2 builds"), text
    assert "rank 2 builds Triton kernel gdn_" in text and "(compile) for " in text, text
    assert all(later_s - first_s >= REPEAT_S or "gdn_" in again for later_s, again in noticed[1:])
    assert len(noticed) <= 3, noticed
    assert len(builds) > 2 or len(noticed) == 1, "the same wait is no news when the quiet window has passed"


def test_ranks_that_wait_for_the_builder_s_lock_are_told_its_name_and_holder(tmp_path: Path) -> None:
    builder = [("phase", "compile"), ("lock", "/cache/gdn.lock"), *kernels(9, 1.0), ("unlock", "/cache/gdn.lock")]
    waiting = [("phase", "compile"), ("sleep", SECOND), ("lock", "/cache/gdn.lock"), ("unlock", "/cache/gdn.lock")]
    noticed = notices_of(tmp_path, [builder, waiting, waiting, waiting])
    first_s, text = noticed[0]
    assert first_s < 1 + 5.0, noticed
    assert "rank 0 builds Triton kernel gdn_" in text and "rank 0 holds lock /cache/gdn.lock" in text, text
    assert "ranks 1-3 wait for lock /cache/gdn.lock" in text, text


def test_ranks_that_wait_for_one_that_works_without_a_build_are_left_to_the_quiet_window(tmp_path: Path) -> None:
    busy = [part for _ in range(9) for part in (("phase", "load"), ("sleep", SECOND), ("phase", "profile"))]
    waiting = [("phase", "load"), ("call", CALL)]
    assert not notices_of(tmp_path, [waiting, waiting, [*busy, ("call", CALL)], waiting])


def test_a_wait_that_began_after_the_silence_is_no_news_and_a_remark_of_the_job_comes_once() -> None:
    printed: list[str] = []
    notices = Notices(printed.append, lambda verdict: "the front end waits" if verdict.cause else "", 5.0)

    def verdict_of(waited_s: float, cause: str = "") -> Verdict:
        blocked = Position(0, "blocked", group="dp", op="all_reduce", seq=7, step=3, since_s=waited_s)
        return Verdict("slow", cause, ranks=(blocked, Position(1, "running", since_s=9.0)))

    notices.silence(verdict_of(0.0))
    assert not printed
    for _ in range(2):
        notices.silence(verdict_of(6.2))
    assert printed == ["slow: rank 0 waits in dp all_reduce #7 (step 3) for 6 s; rank 1 runs outside any collective"]
    for _ in range(2):
        notices.silence(verdict_of(7.0, "host"))
    assert printed[1:] == ["the front end waits"]


def test_where_no_rank_waits_a_silence_prints_nothing_however_short_the_quiet_window_is() -> None:
    printed: list[str] = []
    notices = Notices(printed.append, lambda verdict: "", 1.0)
    notices.silence(Verdict("slow", ranks=(Position(0, "running", since_s=9.0), Position(1, "running", since_s=9.0))))
    assert not printed


def test_builders_are_named_again_at_once_if_they_are_others_and_after_a_while_if_they_are_the_same() -> None:
    printed: list[str] = []
    notices = Notices(printed.append, lambda verdict: "", 5.0)

    def builds(*builders: int, at_s: float) -> None:
        ranks = tuple(
            Position(rank, "building", detail="gdn", since_s=at_s)
            if rank in builders
            else Position(rank, "blocked", group="dp", op="all_reduce", seq=7, step=3, since_s=at_s)
            for rank in range(3)
        )
        waiting = tuple(rank for rank in range(3) if rank not in builders)
        verdict = Verdict("slow", ranks=ranks, waits=(Wait(waiting, "dp all_reduce #7", builders),))
        now_ns = int(at_s * 1e9)
        notices.builds(verdict, now_ns, now_ns)

    builds(2, at_s=10)
    builds(2, at_s=20)
    assert len(printed) == 1 and "rank 2 builds gdn" in printed[0], printed
    builds(1, at_s=22)
    assert len(printed) == 2 and "rank 1 builds gdn" in printed[1], printed
    builds(1, at_s=22 + REPEAT_S)
    assert len(printed) == 3, printed
