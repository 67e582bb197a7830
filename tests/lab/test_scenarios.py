"""Each scenario: the hang is real, the verdict names it, and the cure serves the single process's tokens."""

from __future__ import annotations

import itertools
import os
import re
import time

import pytest
from forked import in_time, run_forked
from written import written

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine.serving.scheduler import live_ranks
from hybrid_moe_ref.parallel.checks.guard import ScheduleGuard
from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.lab import scenarios
from repro.lab.outcome.expectation import matches
from repro.lab.outcome.second_judgement import judge_again
from repro.lab.settings import RunSettings
from repro.store.run_dir import read_json
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import read
from repro.trace.witness.format import Kind
from repro.verdict import Position, Verdict

NUM_SEEDS = int(os.environ.get("HMR_SCENARIO_SEEDS", "1"))
SEEDS = tuple(range(NUM_SEEDS))
MAIN_SEEDS = [
    *SEEDS, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(len(SEEDS), 20))
]  # fmt: skip
"""Of the scenario that everything began with all twenty seeds are run, in the full suite."""


def test_every_scenario_says_what_it_is_and_what_it_mirrors():
    for name in scenarios.names():
        scenario = scenarios.load(name)
        assert scenario.name == name and scenario.summary and "#" in scenario.source


def test_an_unknown_scenario_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'metadata_rebuild'"):
        scenarios.load("metadata_rebild")


def small(name, variant, **flags):
    """A run that shows the mechanism on four ranks and four layers, to keep the suite short."""
    document = {"num_ranks": 4, "model": {"layer_pattern": "GMAG"}, "engine": {"unfinished_interval": 16}}
    if "tp_size" in scenarios.load(name).defaults:
        document["tp_size"] = 4
    return scenarios.settings_of({"scenario": name, "variant": variant, **flags}, document)


SHORT = {
    ("group_order", "fault", "observe"),
    ("zero_token_return", "fix", ""),
}
"""What of all that is below also the default suite runs, with the first seed."""


def telling_seeds(name):
    """The first seeds whose workload lets the fault show: with few ranks not every one does."""
    hang = scenarios.load(name).hang
    telling = (seed for seed in range(100) if hang(small(name, "fault", seed=seed)).verdict != "clean")
    return list(itertools.islice(telling, NUM_SEEDS))


RUNS = [
    pytest.param(
        name,
        variant,
        checks,
        seed,
        id=f"{name}-{variant}-{checks or 'default'}-{seed}",
        marks=() if (name, variant, checks) in SHORT and index == 0 else pytest.mark.full,
    )
    for name in scenarios.names()
    for index, seed in enumerate(telling_seeds(name))
    for variant, checks in (("fault", "observe"), ("fault", "agree"), ("fix", ""), ("control", ""))
] + [
    pytest.param(name, variant, "strict", telling_seeds(name)[0], id=f"{name}-{variant}-strict", marks=pytest.mark.full)
    for name in ("silent_pairing", "size_vector")
    for variant in ("fault", "fix")
]


def assert_stopped_at_once_with_the_place(run_dir, detail, context):
    """By the witnesses' clocks. The bounds are those of a machine that runs what is ready to run: where more processes
    than processors are, by the system's own count, each waits so much longer."""
    at_c1 = re.match(r"ScheduleMismatch: step \d+: the (schedules differ at entry|ranks of a tp group do not)", detail)
    place = r" of (layers\.\d|mtp\.layers\.\d|moe_experts|autotune\.)|would leave after step \d|: rank \d has token"
    assert re.search(place, detail), context
    failed_ns = [
        event.t_ns for rank in range(4) for event in read(run_dir.witness(rank)).events() if event.kind == Kind.FAILED
    ]
    spread_s = (max(failed_ns) - min(failed_ns)) / 1e9
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    limit_s = (0.1 if at_c1 else 1.0) * busy
    assert len(failed_ns) == 4 and spread_s <= limit_s, f"{spread_s:.3f} s of {limit_s:.3f} s: {context}"


@pytest.mark.timeout(240)  # some build kernels or compile
@pytest.mark.parametrize(("name", "variant", "checks", "seed"), RUNS)
def test_each_scenario_hangs_as_foretold_is_stopped_by_the_guard_and_runs_fixed(tmp_path, name, variant, checks, seed):
    scenario, settings = scenarios.load(name), small(name, variant, checks=checks, seed=seed)
    if missing := scenario.missing(settings):
        pytest.skip(missing)
    run_dir, document = run_forked(settings, tmp_path)
    context = f"{name} {variant} {checks} seed {seed}: {document}"
    assert document["matches_expected"], context
    expected = scenario.expected(settings)
    if expected.verdict != "clean" and not expected.error:
        return
    if expected.error:
        living = [position["detail"] for position in document["ranks"] if position["state"] != "dead"]
        assert len(set(living)) == 1, context
        if expected == scenarios.REFUSED:
            assert_stopped_at_once_with_the_place(run_dir, living[0], context)
    else:
        served = {request: tokens for rank in range(4) for request, tokens in read_json(run_dir.output(rank)).items()}
        assert served == read_json(run_dir.reference), context


@pytest.mark.parametrize("name", ["graph_mode", "size_vector"])
def test_a_fault_that_does_not_show_is_clean_under_the_guard_too(name):
    found = {
        scenario.expected(small(name, "fault", checks=checks, seed=seed)).verdict
        for scenario in [scenarios.load(name)]
        for seed in range(20)
        if scenario.hang(small(name, "fault", seed=seed)).verdict == "clean"
        for checks in ("agree", "strict")
    }
    assert found == {"clean"}


@pytest.mark.parametrize(
    "name", ["drafter_skip", "group_order", "idle_gdn_crash", "late_preemption", "size_vector", "state_order"]
)
def test_most_seeds_foretell_a_hang_and_not_one_and_the_same(name):
    found = [
        scenarios.load(name).expected(scenarios.settings_of({"scenario": name, "seed": seed})) for seed in range(20)
    ]
    assert sum(expected.verdict != "clean" for expected in found) >= 18, found
    assert len({(expected.culprits, expected.step) for expected in found}) > 5, found


@pytest.mark.parametrize("seed", range(200))
def test_every_seed_foretells_a_hang_in_which_some_ranks_are_idle(seed):
    settings = RunSettings("metadata_rebuild", "fault", seed=seed)
    expected = scenarios.load("metadata_rebuild").expected(settings)
    live = live_ranks(settings.requests(), settings.engine)
    assert expected.verdict == "deadlock" and 0 < len(expected.culprits) < 8, f"seed {seed}"
    assert all(len(step) == 8 for step in live[: expected.step - 1]), f"seed {seed}"
    assert tuple(live[expected.step - 1]) == expected.culprits, f"seed {seed}"


@pytest.mark.parametrize("seed", MAIN_SEEDS)
def test_metadata_rebuild_fault_is_a_deadlock_of_exactly_the_live_ranks(tmp_path, seed):
    settings = RunSettings("metadata_rebuild", "fault", seed=seed)
    run_dir, document = run_forked(settings, tmp_path, with_reference=False)
    expected = scenarios.load("metadata_rebuild").expected(settings)
    context = f"seed {seed}: {document}"
    assert (document["verdict"], document["cause"]) == ("deadlock", "extra"), context
    assert tuple(document["culprits"]) == expected.culprits, context
    assert document["matches_expected"], context
    assert in_time(run_dir, document, 2.5, settings), context
    for position in document["ranks"]:
        assert position["step"] == expected.step, context
        culprit = position["rank"] in expected.culprits
        group, op = ("dp", "all_reduce") if culprit else ("ep", "all_gather_v")
        layer = "layers.0.gated_delta_net" if culprit else "layers.0.moe"
        assert (position["group"], position["op"], position["layer"]) == (group, op, layer), context
    for rank in range(8):
        assert "all_reduce" in run_dir.stack(rank).read_text() or "all_gather" in run_dir.stack(rank).read_text()
        assert read_json(run_dir.flight_recorder(rank))["entries"], context
    assert read_json(run_dir.verdict) == document
    judged, whole = judge_again(run_dir, settings)
    again = written(judged)
    assert whole
    decision = [again[key] for key in ("verdict", "cause", "culprits")]
    assert decision == ["deadlock", "extra", document["culprits"]], context
    assert again.keys() == document.keys() and again["seconds"] == document["seconds"]


@pytest.mark.full
@pytest.mark.parametrize("variant", ["control", "fix"])
@pytest.mark.parametrize("seed", MAIN_SEEDS)
def test_metadata_rebuild_control_and_fix_serve_the_tokens_of_one_process(tmp_path, variant, seed):
    settings = RunSettings("metadata_rebuild", variant, seed=seed)
    run_dir, document = run_forked(settings, tmp_path)
    assert document["verdict"] == "clean" and document["matches_expected"], f"seed {seed}: {document}"
    served = {name: tokens for rank in range(8) for name, tokens in read_json(run_dir.output(rank)).items()}
    assert served == read_json(run_dir.reference), f"seed {seed}"


def test_the_fault_under_the_guard_stops_every_rank_with_the_layer_named(tmp_path):
    settings = small("metadata_rebuild", "fault", checks="agree")
    _, document = run_forked(settings, tmp_path, with_reference=False)
    assert document["verdict"] == "crash" and document["matches_expected"], document
    assert {position["state"] for position in document["ranks"]} == {"failed"}, document
    details = {position["detail"] for position in document["ranks"]}
    assert len(details) == 1, details
    assert re.fullmatch(
        r"ScheduleMismatch: rank \d would issue dp all_reduce of layers.0.gated_delta_net in step \d, "
        r"but the schedule has ep all_gather_v of layers.0.moe",
        details.pop(),
    ), details


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", scenarios.names())
def test_each_scenario_hangs_as_foretold_on_eight_ranks_and_eight_layers(tmp_path, name):
    settings = scenarios.settings_of({"scenario": name, "variant": "fault"})
    if missing := scenarios.load(name).missing(settings):
        pytest.skip(missing)
    _, document = run_forked(settings, tmp_path)
    assert document["matches_expected"], document


@pytest.mark.parametrize(
    ("name", "group"), [("size_vector", "ep"), pytest.param("silent_pairing", "tp", marks=pytest.mark.full)]
)
def test_what_the_guard_would_let_pass_strict_ranks_see_before_any_data_moves(tmp_path, name, group):
    """The guard refuses both faults by itself; here it looks away."""

    def look_away(rank):
        ScheduleGuard.begin = lambda self, step, schedule: None
        ScheduleGuard.admit = lambda self, collective: None

    settings = small(name, "fault", checks="strict", seed=telling_seeds(name)[0])
    run_dir, document = run_forked(settings, tmp_path, with_reference=False, in_rank=look_away)
    assert document["verdict"] == "crash", document
    (detail,) = {position["detail"] for position in document["ranks"]}
    assert re.match(rf"ScheduleMismatch: {group} #\d+: ranks \[.*\] .*; ranks \[.*\] ", detail), detail
    assert " of layers.0.moe " in detail, detail
    traces = [trace for rank in range(4) for trace in read(run_dir.witness(rank)).groups if trace.name == group]
    (trace,) = {(trace.issued, trace.left) for trace in traces}
    assert trace[0] == trace[1] + 1, "all ranks were about to issue the same, and none has"


def test_another_error_than_the_guards_is_not_what_was_expected():
    def failed(detail):
        return Verdict("crash", "error", (0,), ranks=(Position(0, "failed", detail=detail),))

    assert matches(failed("ScheduleMismatch: rank 0 would issue ..."), scenarios.REFUSED)
    assert not matches(failed("CacheExhausted: a new sequence needs 6 pages"), scenarios.REFUSED)


@pytest.mark.full  # the simulated watch has delays of every length
def test_a_rank_that_sleeps_between_steps_raises_no_alarm(tmp_path):
    def sleepy(rank):
        if rank == 3:
            begin_step = Recorder.begin_step

            def slowly(self, step: int, schedule: tuple[ScheduleEntry, ...], num_live: int):
                time.sleep(0.3 if 3 < step < 7 else 0)
                begin_step(self, step, schedule, num_live)

            Recorder.begin_step = slowly

    settings = small("metadata_rebuild", "control", quiet_window_s=0.4)
    _, document = run_forked(settings, tmp_path, in_rank=sleepy)
    assert document["verdict"] == "clean", document


@pytest.mark.full
def test_a_rank_that_sleeps_far_beyond_the_quiet_window_is_slow_not_stuck(tmp_path):
    def sleepy(rank):
        if rank == 3:
            begin_step = Recorder.begin_step

            def slowly(self, step: int, schedule: tuple[ScheduleEntry, ...], num_live: int):
                time.sleep(2.5 if step == 4 else 0)
                begin_step(self, step, schedule, num_live)

            Recorder.begin_step = slowly

    settings, notices = small("metadata_rebuild", "control", quiet_window_s=0.3), []
    _, document = run_forked(settings, tmp_path, in_rank=sleepy, notice=notices.append)
    if document["verdict"] != "clean":  # where it was seen through three quiet windows, that is the last word
        assert (document["verdict"], document["culprits"]) == ("slow", [3]), document
    assert any(line.startswith("slow: ") and "rank 3 " in line for line in notices), notices


def test_served_tokens_that_differ_from_the_reference_are_corrupt(tmp_path):
    settings = small("metadata_rebuild", "control")

    def tamper(run_dir, pids):
        tokens = read_json(run_dir.reference)
        tokens["rank2-0"][0] += 1
        from repro.store.run_dir import write_json

        write_json(run_dir.reference, tokens)

    _, document = run_forked(settings, tmp_path, during=tamper)
    assert document["verdict"] == "corrupt" and not document["matches_expected"]
    assert any("request rank2-0: token 0" in line for line in document["evidence"]), document["evidence"]


@pytest.mark.full
def test_at_the_deadline_a_hang_that_was_not_quiet_long_enough_is_inconclusive(tmp_path):
    settings = RunSettings("metadata_rebuild", "fault", quiet_window_s=60, deadline_s=15)
    started = time.monotonic()
    run_dir, document = run_forked(settings, tmp_path, with_reference=False)
    assert document["verdict"] in ("inconclusive", "deadlock"), document
    assert any("deadline" in line for line in document["evidence"]), document["evidence"]
    assert all(run_dir.stack(rank).stat().st_size for rank in range(8)), "stacks are taken before the end all the same"
    assert time.monotonic() - started < 45
