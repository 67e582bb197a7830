"""What a watch keeps of the silences of a run that ends well."""

from __future__ import annotations

import json
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from written import written

from repro.hosts.system import STOPPED
from repro.lab.outcome.expectation import document_of, watch_options
from repro.lab.outcome.second_judgement import judge_again
from repro.lab.outcome.tokens import MAX_LINES, wrong_tokens
from repro.lab.settings import RunSettings
from repro.lab.start.ending import end
from repro.store.run_dir import RunDir, read_tokens, write_json
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import create
from repro.trace.witness.format import Identity
from repro.verdict import Verdict
from repro.verdict.facts import Facts
from repro.verdict.result import Position
from repro.watch.comparison import Comparison
from repro.watch.flight_recorder import RecorderCheck, compare_dumps
from repro.watch.live import DEATH_GRACE_S, DEATH_PATIENCE_S, Watch
from repro.watch.silences import Silences

SETTINGS = RunSettings("compile_skew", "fault", num_ranks=4, quiet_window_s=1.0)


def started(out: Path, done: bool = False) -> tuple[RunDir, Watch]:
    run_dir = RunDir.create(out, "compile_skew", "fault", 0)
    for rank in range(4):
        create(run_dir.witness(rank), Identity(rank, 4))
        if done:
            Recorder.open(run_dir.witness(rank), rank, 4).done()
    return run_dir, Watch(
        run_dir,
        watch_options(SETTINGS),
        job_alive=lambda: True,
        compare=lambda final: Comparison(evidence="all equal"),
        describe=lambda verdict: document_of(SETTINGS, verdict),
    )


@pytest.mark.parametrize(
    ("waiting", "awaited", "kept_s"),
    [
        ("blocked", "building", 3.2),  # others stand in a collective: as long as they do, whatever it says of itself
        ("locked", "building", 0.0),  # they wait for its lock before the first step, and it gives signs of life
        ("blocked", "starting", 0.0),
    ],
)
def test_who_waits_in_a_collective_for_a_build_has_waited_however_lively_that_is(waiting, awaited, kept_s):
    silences = Silences()
    places = [*(Position(rank, waiting, since_s=3.2 + rank) for rank in range(3)), Position(3, awaited, since_s=0.4)]
    verdict = Verdict("slow", culprits=(3,), ranks=tuple(places), quiet_s=1.1)
    silences.remember(verdict, Facts(), alive_s=0.1, quiet_window_s=1.0)
    assert silences.slowest(1.0) == (verdict if kept_s else None)


def a_silence(culprit=3, quiet_s=4.0, evidence=()):
    places = [Position(rank, "running" if rank == culprit else "blocked", since_s=9.0) for rank in range(4)]
    return Verdict("slow", culprits=(culprit,), ranks=tuple(places), evidence=evidence, quiet_s=quiet_s)


def test_a_silence_without_signs_of_life_counts_by_its_length():
    silences = Silences()
    for quiet_s in (2.0, 4.0, 3.0):
        silences.remember(a_silence(quiet_s=quiet_s), Facts(), alive_s=9.0, quiet_window_s=1.0)
    assert silences.slowest(1.0) == a_silence(quiet_s=4.0)
    assert silences.slowest(1.5) is None


@pytest.mark.parametrize("facts", [Facts(excused={3: STOPPED}), Facts(starved={3: 0.4}, cores={3: 0.02})])
def test_a_rank_that_was_stopped_or_lacked_a_processor_makes_no_run_slow(facts):
    silences = Silences()
    silences.remember(a_silence(), facts, alive_s=9.0, quiet_window_s=1.0)
    assert silences.slowest(1.0) is None


def test_time_without_a_processor_is_taken_off_the_silence_in_which_it_was():
    silences = Silences()
    for quiet_s, share in ((1.0, 0.9), (2.0, 0.5), (3.0, 0.0), (4.0, 0.0), (5.0, 0.2)):  # 1.6 s are lost
        silences.remember(a_silence(quiet_s=quiet_s), Facts(starved={3: share}), alive_s=9.0, quiet_window_s=1.0)
    assert silences.slowest(1.0) == a_silence(quiet_s=5.0)
    assert silences.slowest(1.2) is None
    for quiet_s in (1.0, 2.0, 3.0, 3.9):  # another silence, of which nothing is lost
        silences.remember(a_silence(quiet_s=quiet_s), Facts(), alive_s=9.0, quiet_window_s=1.0)
    assert silences.slowest(1.2) == a_silence(quiet_s=3.9)


@pytest.mark.parametrize(("waiting", "kept"), [(1, False), (2, True), (3, True)])
def test_half_of_the_ranks_may_wait_for_the_other_half(waiting, kept):
    """So that a slow start of two ranks is noticed."""
    places = [Position(rank, "locked" if rank < waiting else "building", since_s=9.0) for rank in range(4)]
    verdict = Verdict("slow", culprits=tuple(range(waiting, 4)), ranks=tuple(places), quiet_s=4.0)
    silences = Silences()
    silences.remember(verdict, Facts(), alive_s=9.0, quiet_window_s=1.0)
    assert silences.slowest(1.0) == (verdict if kept else None)


def test_a_run_in_which_several_were_waited_for_in_turn_names_them_all(tmp_path):
    """Who mends only what took longest keeps the other wait."""
    _, watch = started(tmp_path, done=True)
    for culprit, quiet_s in ((3, 4.0), (1, 5.0), (2, 1.5)):
        evidence = (f"rank {culprit} building for {quiet_s:.1f} s: gdn",)
        watch._silences.remember(a_silence(culprit, quiet_s, evidence), Facts(), alive_s=9.0, quiet_window_s=1.0)
    document = written(watch.run())
    assert (document["verdict"], document["culprits"]) == ("slow", [1])
    assert document["evidence"] == [
        "rank 1 building for 5.0 s: gdn",
        "another wait of 4.0 s: rank 3 building for 4.0 s: gdn",
        "then all ranks finished",
        "all equal",
    ]


def test_what_an_interrupted_run_had_not_decided_is_no_finding(tmp_path):
    """Nor when it is judged once more."""
    run_dir, watch = started(tmp_path)
    watch.interrupted = lambda: True
    write_json(run_dir.config, SETTINGS.to_mapping())
    document = written(watch.run())
    again, _ = judge_again(run_dir, SETTINGS)
    for verdict in (document, written(again)):
        assert (verdict["verdict"], verdict["culprits"], verdict["confidence"]) == ("inconclusive", [], "undecided")
        assert "the run was interrupted before it was decided" in verdict["evidence"]


@pytest.mark.parametrize(
    ("pending", "line"),
    [
        ([("ep", 3)], "rank 2: the Flight Recorder has the same collective pending"),
        # One of ours may be several of torch's: an uneven gather in broadcasts.
        ([("ep", 6)], "rank 2: the Flight Recorder has a collective of the same group pending, under a higher number"),
        ([("ep", 2)], "the Flight Recorder has ep #2 pending, the witness ep #3"),
        ([("dp", 9)], "the Flight Recorder has dp #9 pending, the witness ep #3"),
        ([], "the Flight Recorder has nothing pending, the witness ep #3"),
    ],
)
def test_the_flight_recorder_is_held_against_the_witness_as_far_as_the_two_count_alike(tmp_path, pending, line):
    run_dir, _ = started(tmp_path)
    entries = [{"process_group": ["1", name], "collective_seq_id": seq, "retired": False} for name, seq in pending]
    entries.append({"process_group": ["1", "ep"], "collective_seq_id": 1, "retired": True})
    write_json(run_dir.flight_recorder(2), {"entries": entries})
    check = compare_dumps(run_dir, [Position(2, "blocked", group="ep", op="all_gather_v", seq=3)])
    (found,) = [*check.sentences(), *check.contradicted.values()]
    assert found.startswith(line)
    assert check.contradicted.keys() <= {2}


def test_a_dump_that_never_saw_the_group_contradicts_nothing(tmp_path):
    """Another version of PyTorch may call the group something else."""
    run_dir, _ = started(tmp_path)
    entry = {"process_group": ["0", "default_pg"], "collective_seq_id": 1, "retired": True}
    write_json(run_dir.flight_recorder(2), {"entries": [entry]})
    assert compare_dumps(run_dir, [Position(2, "blocked", group="ep", op="all_reduce", seq=3)]) == RecorderCheck()
    assert compare_dumps(run_dir, [Position(2, "blocked", group="world", op="all_reduce", seq=3)]).contradicted


@pytest.mark.parametrize(("others_go_on", "limit_s"), [(False, DEATH_GRACE_S), (True, DEATH_PATIENCE_S)])
def test_after_a_death_the_others_have_their_time_to_react_and_no_more(tmp_path, monkeypatch, others_go_on, limit_s):
    _, watch = started(tmp_path)
    watch.job_alive = lambda: False
    died_ns = 10**15

    def is_settled(after_s):
        now_ns = died_ns + round(after_s * 1e9)
        monkeypatch.setattr(watch, "_last_event_ns", lambda: now_ns if others_go_on else died_ns - 10**9)
        return watch._death_is_settled(now_ns)

    assert [is_settled(after_s) for after_s in (0.0, limit_s - 0.01, limit_s + 0.01)] == [False, False, True]


def test_only_what_still_runs_is_ended_by_its_pid(tmp_path):
    """The system may have given the number of a launcher that has ended to somebody else."""

    class Ended:
        pid = 0

        def poll(self):
            return 0

        def wait(self):
            return 0

    run_dir, _ = started(tmp_path)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        Ended.pid = bystander.pid
        end(run_dir, [Ended()], [])
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    ("reference", "outputs", "message"),
    [
        ({"a": [1]}, [{"a": [1]}, {"a": [1]}], []),
        ({"a": [1]}, [{"a": [1]}, {}], ["request a was served by 1 ranks instead of 2"]),
        ({}, [{"a": [1]}, {"a": [1]}], ["request a is not in the single-process reference"]),
        ({"a": [1]}, [{}, {}], ["request a was not served"]),
    ],
)
def test_each_request_is_served_by_all_ranks_of_its_group_and_no_other_is(tmp_path, reference, outputs, message):
    run_dir, _ = started(tmp_path)
    write_json(run_dir.reference, reference)
    for rank, output in enumerate(outputs):
        write_json(run_dir.output(rank), output)
    assert wrong_tokens(run_dir, num_ranks=2, tp_size=2) == message


def test_tokens_are_compared_one_rank_at_a_time_and_only_so_many_differences_listed(tmp_path):
    run_dir, _ = started(tmp_path)
    write_json(run_dir.reference, {})
    output = json.dumps({f"{number}{'x' * 200}": [number] * 10 for number in range(1200)})
    for rank in range(5):
        run_dir.output(rank).write_text(output)
    tracemalloc.start()
    try:
        read_tokens(run_dir.output(0))
        one_rank = tracemalloc.get_traced_memory()[1]
        lines = wrong_tokens(run_dir, num_ranks=5, tp_size=1)
        assert tracemalloc.get_traced_memory()[1] < 3 * one_rank
    finally:
        tracemalloc.stop()
    assert len(lines) == MAX_LINES and max(map(len, lines)) < 200
