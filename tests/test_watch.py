"""What a watch keeps of the silences of a run that ends well."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from repro.comparison import wrong_tokens
from repro.evidence import compare_with_flight_recorder
from repro.expectation import document_of, watch_options
from repro.launch import end
from repro.layout import Identity
from repro.record import Recorder
from repro.rejudge import judge_again
from repro.rundir import RunDir, write_json
from repro.settings import RunSettings
from repro.verdict import Verdict
from repro.verdict.result import Position
from repro.watch import Comparison, Watch
from repro.witness import create

SETTINGS = RunSettings("compile_skew", "fault", num_ranks=4, quiet_window_s=1.0)


def started(out: Path) -> tuple[RunDir, Watch]:
    run_dir = RunDir.create(out, "compile_skew", "fault", 0)
    for rank in range(4):
        create(run_dir.witness(rank), Identity(rank, 4))
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
def test_who_waits_in_a_collective_for_a_build_has_waited_however_lively_that_is(tmp_path, waiting, awaited, kept_s):
    run_dir, watch = started(tmp_path)
    builder = Recorder.open(run_dir.witness(3), 3, 4)
    builder.local("heartbeat", "torch.compile of RMSNorm")
    places = [*(Position(rank, waiting, since_s=3.2 + rank) for rank in range(3)), Position(3, awaited, since_s=0.4)]
    verdict = Verdict("slow", culprits=(3,), ranks=tuple(places), quiet_s=1.1)
    watch._remember(verdict)
    assert watch._silences == ({(3,): (kept_s, verdict)} if kept_s else {})


def test_a_silence_without_signs_of_life_counts_by_its_length(tmp_path):
    _, watch = started(tmp_path)
    places = [*(Position(rank, "blocked", since_s=9.0) for rank in range(3)), Position(3, "running")]
    for quiet_s in (2.0, 4.0, 3.0):
        watch._remember(Verdict("slow", culprits=(3,), ranks=tuple(places), quiet_s=quiet_s))
    assert watch._silences[3,][0] == 4.0


def test_a_run_in_which_several_were_waited_for_in_turn_names_them_all(tmp_path):
    """Who mends only what took longest keeps the other wait."""
    _, watch = started(tmp_path)
    for culprit, quiet_s in ((3, 4.0), (1, 5.0), (2, 1.5)):
        places = [Position(rank, "running" if rank == culprit else "blocked", since_s=9.0) for rank in range(4)]
        told = (f"rank {culprit} building for {quiet_s:.1f} s: gdn",)
        watch._remember(Verdict("slow", culprits=(culprit,), ranks=tuple(places), evidence=told, quiet_s=quiet_s))
    verdict = watch._compared(final=False)
    assert (verdict.verdict, verdict.culprits) == ("slow", (1,))
    assert verdict.evidence[:2] == (
        "rank 1 building for 5.0 s: gdn",
        "for 4.0 s also: rank 3 building for 4.0 s: gdn",
    )


def test_what_an_interrupted_run_had_not_decided_is_no_finding(tmp_path):
    """Nor when it is judged once more."""
    run_dir, watch = started(tmp_path)
    watch.interrupted = lambda: True
    write_json(run_dir.config, SETTINGS.to_mapping())
    document = watch.run()
    again, _ = judge_again(run_dir, SETTINGS)
    for told in (document, again):
        assert (told["verdict"], told["culprits"], told["confidence"]) == ("inconclusive", [], "undecided")
        assert "the run was interrupted before it was decided" in told["evidence"]


def test_the_evidence_is_taken_also_if_the_judge_fails(tmp_path, monkeypatch):
    _, watch = started(tmp_path)
    taken = []
    monkeypatch.setattr(watch, "_decide", lambda: 1 / 0)
    monkeypatch.setattr(watch, "_collect_evidence", lambda: taken.append("evidence"))
    with pytest.raises(ZeroDivisionError):
        watch.run()
    assert taken == ["evidence"]


@pytest.mark.parametrize(
    ("pending", "told"),
    [
        ([("ep", 3)], "rank 2: the Flight Recorder has the same collective pending"),
        # One of ours may be several of torch's: an uneven gather in broadcasts.
        ([("ep", 6)], "rank 2: the Flight Recorder has a collective of the same group pending, under a higher number"),
        ([("ep", 2)], "rank 2: the Flight Recorder has ep #2 pending, the witness ep #3"),
        ([("dp", 9)], "rank 2: the Flight Recorder has dp #9 pending, the witness ep #3"),
        ([], "rank 2: the Flight Recorder has nothing pending, the witness ep #3"),
    ],
)
def test_the_flight_recorder_is_held_against_the_witness_as_far_as_the_two_count_alike(tmp_path, pending, told):
    run_dir, _ = started(tmp_path)
    entries = [{"process_group": ["1", name], "collective_seq_id": seq, "retired": False} for name, seq in pending]
    write_json(run_dir.flight_recorder(2), {"entries": entries})
    position = Position(2, "blocked", group="ep", op="all_gather_v", seq=3)
    (line,) = compare_with_flight_recorder(run_dir, [position])
    assert line.startswith(told)


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
    ("reference", "outputs", "told"),
    [
        ({"a": [1]}, [{"a": [1]}, {"a": [1]}], []),
        ({"a": [1]}, [{"a": [1]}, {}], ["request a was served by 1 ranks, not by 2"]),
        ({}, [{"a": [1]}, {"a": [1]}], ["request a is none of the single-process reference's"]),
        ({"a": [1]}, [{}, {}], ["request a was not served"]),
    ],
)
def test_each_request_is_served_by_all_ranks_of_its_group_and_no_other_is(tmp_path, reference, outputs, told):
    run_dir, _ = started(tmp_path)
    write_json(run_dir.reference, reference)
    for rank, output in enumerate(outputs):
        write_json(run_dir.output(rank), output)
    assert wrong_tokens(run_dir, num_ranks=2, tp_size=2) == told
