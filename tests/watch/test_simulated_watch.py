"""The watcher against the truth: it watches simulated runs on one to four hosts until it has decided.

    HMR_SEEDS=2000 pytest tests/watch/test_simulated_watch.py          as many seeds as you have time for
    pytest -m full tests/watch/test_simulated_watch.py                 10,000 of them

Two properties hold for every seed. The watcher says what the judge says of the whole truth, or less: never a wrong
`deadlock`, never a culprit that is none. And judged again from its files, on any machine, a run gives the verdict that
verdict.json has.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from drawn_case import FOREVER_NS, WRAPPING, Case
from faults import draw
from scene import MS
from simulated_watch import World, make_run_dir, move_to_another_machine
from truth import Truth, truth
from written import written

from repro.hosts.locks import UNKNOWN
from repro.hosts.options import WatchOptions
from repro.verdict.classes import CLASSES
from repro.watch.comparison import Comparison
from repro.watch.document import describe as describe_verdict
from repro.watch.offline import judge_files

QUICK = int(os.environ.get("HMR_SEEDS", "200"))
PART = 50
"""Seeds of one test, so that the workers of a test run share them."""
LEAST_EXACT = 0.6
"""The share of runs in which the watcher says all that the truth is."""

JUDGED = (
    "verdict", "cause", "culprits", "suspects", "ranks", "first_divergence", "cycle", "waits", "confidence", "quiet_s",
    "evidence", "sentences",
)  # fmt: skip
"""What of verdict.json follows from the files of the run."""


def world_of(case: Case, rng: random.Random, root: Path) -> World:
    """The hosts of a case: some starved, some with agents that are late, fall silent, or are not there."""
    run_dir = make_run_dir(root)
    sim = case.simulate(until_ns=0, scale=rng.choice((1, 1, 20, 100)), folder=run_dir.root)
    queued = ("ep",) if rng.random() < 0.1 else ()
    window_s = rng.choice((0.2, 1.0)) if case.hosts == 1 else 1.0  # longer than the hosts' clocks disagree
    options = WatchOptions(case.num_ranks, window_s, window_s * rng.choice((5, 5, 12)), queued)
    world = World(sim, run_dir, options, case.hosts)
    world.add_agents([index for index in range(1, case.hosts) if rng.random() < 0.85])
    for index, host in enumerate(world.hosts):
        host.holders = {name: UNKNOWN if "unknown_lock" in case.faults else pid for name, pid in case.locks.items()}
        if rng.random() < 0.15:
            host.starved = rng.choice((0.05, 0.2, 0.9))
        if rng.random() < 0.1:
            host.late_s = rng.choice((0.01, 0.3, 1.0))
        if rng.random() < 0.2:
            world.late_s[index] = rng.choice((0.3, 1.0, 3.0))
        if rng.random() < 0.1:
            world.silent_ns[index] = sim.now_ns + rng.randrange(5_000 * MS)
    if rng.random() < 0.1:
        sim.frozen[rng.randrange(case.num_ranks)] = sim.now_ns + rng.randrange(8_000) * MS
    return world


def check(seed: int, root: Path) -> bool:
    """Watch one case; whether the verdict has all of the truth. Fails with the timeline of what is wrong."""
    rng = random.Random(seed)
    case = draw(seed)
    world = world_of(case, rng, root)
    sim = world.sim
    interrupted_ns = rng.randrange(6_000) * MS if rng.random() < 0.03 else 1 << 62
    got = written(world.watch(interrupted=lambda: sim.now_ns > interrupted_ns).run())
    moving = [rank for rank, each in enumerate(sim.ranks) if not each.blocked or rank in sim.frozen]
    gone = {rank for rank, each in enumerate(sim.ranks) if each.state in ("dead", "failed")}
    before = [recorder._num_events for recorder in sim.recorders]
    judged_again(world, got, rng, f"seed {seed}, {case.fault}")
    sim.run(FOREVER_NS // 2)
    judged_again(world, got, rng, f"seed {seed}, {case.fault}, after its ranks went on", went_on=True)
    want = truth(case, sim)
    moved = {rank for rank, recorder in enumerate(sim.recorders) if recorder._num_events != before[rank]}
    text = functools.partial(describe, case, world, want, got)  # is written only for a failure
    culprits = set(got["culprits"])
    assert got["cause"] is None or got["cause"] in CLASSES[got["verdict"]].causes, text()
    match got["verdict"]:
        case "deadlock":
            # A rank that the backend ended for its sizes, unseen, stands where its sizes differ.
            unseen = {str(rank) for rank in gone} - got["system"]["alive"].keys()
            aborted = ["crash"] if unseen and got["cause"] == "sizes" else []
            assert want.verdict in ("deadlock", *aborted, *(["corrupt"] if case.shape is WRAPPING else [])), text()
            assert culprits <= set(want.culprits), text()
            assert not moved & {rank for link in got["cycle"] for rank in link["ranks"]}, text()
        case "slow":
            assert culprits <= set(moving), text()
            still = [at for at in got["ranks"] if at["rank"] in culprits and at["state"] != "done"]
            quiet_s = world.options.quiet_window_s
            assert all(
                at["since_s"] >= quiet_s or at["state"] == "starting" or at["rank"] in sim.frozen for at in still
            ), text()
        case "crash":
            assert gone and culprits <= {*case.culprits}, text()
        case "stall" | "corrupt" | "clean":
            assert got["verdict"] == want.verdict and culprits <= set(want.culprits), text()
        case _:
            assert got["verdict"] == "inconclusive" and not culprits, text()
    return bool(got["verdict"] == want.verdict and (culprits == set(want.culprits) or not want.provable))


def judged_again(world: World, got: dict[str, Any], rng: random.Random, text: str, went_on: bool = False) -> None:
    """Here, and where neither this host nor this boot is known.

    went_on   whether ranks have recorded events since the verdict, which may have overwritten those that were judged
    """
    for elsewhere in (False, True) if rng.random() < 0.25 else (True,):
        if elsewhere:
            move_to_another_machine(world.run_dir, rng)
        again = judge_files(world.run_dir, world.options, Comparison())
        overwritten = any("does not hold" in line for line in again.verdict.evidence)
        assert again.whole or (went_on and overwritten), f"{text}: {again.verdict.evidence}"
        if overwritten:
            continue
        verdict = written(describe_verdict(again.verdict))
        differ = {name: (verdict[name], got[name]) for name in JUDGED if verdict[name] != got[name]}
        if got["verdict"] == "slow" and all(position["state"] == "done" for position in verdict["ranks"]):
            differ = {name: values for name, values in differ.items() if name not in ("ranks", "quiet_s")}
        assert not differ, f"{text}, elsewhere {elsewhere}: (again, before) {differ}\n{got['evidence']}"


def describe(case: Case, world: World, want: Truth, got: dict[str, Any]) -> str:
    options = world.options
    return "\n".join(
        [
            f"seed {case.seed}, {case.fault} on {case.num_ranks} ranks of {case.hosts} hosts, {options}",
            f"truth:   {want}",
            f"verdict: {got['verdict']} {got['cause']} culprits {got['culprits']} suspects {got['suspects']}",
            *got["sentences"],
            *got["evidence"],
            f"facts: {got['system']}",
            world.sim.timeline(),
        ]
    )


def check_seeds(seeds: range, root: Path) -> None:
    exact = 0
    for seed in seeds:
        exact += check(seed, root / str(seed))
        shutil.rmtree(root / str(seed))
    print(f"{exact} of {len(seeds)} watched runs judged as by the whole truth")
    assert exact >= LEAST_EXACT * len(seeds), f"the watcher says too little: {exact} of {len(seeds)}"


@pytest.mark.parametrize("first", range(0, QUICK, PART))
def test_a_watcher_says_the_truth_or_less_and_its_files_say_the_same_anywhere(tmp_path: Path, first: int) -> None:
    check_seeds(range(first, min(first + PART, QUICK)), tmp_path)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_ten_thousand_watched_runs_end_in_the_truth_or_less(tmp_path: Path) -> None:
    check_seeds(range(max(10_000, QUICK)), tmp_path)
