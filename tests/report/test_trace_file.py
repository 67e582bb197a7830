"""The trace of a run for Perfetto, and the times that a page shows."""

from __future__ import annotations

import json
from pathlib import Path

from reported import AGREE, write_hang, write_run
from scene import Scene

from repro import report
from repro.report.gather import gather
from repro.report.lanes import Labels, SharedClock, read_lane
from repro.store.run_dir import RunDir, write_json

ROOT = Path(__file__).resolve().parents[2]


def test_the_trace_has_one_track_a_rank_and_group(tmp_path):
    root, _ = write_hang(tmp_path)
    report.write(root)
    events = json.loads((root / "trace.json").read_text())["traceEvents"]
    tracks = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    ranks = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert sorted(ranks) == [f"rank {rank}" for rank in range(4)]
    for pid in ranks.values():
        assert {name for owner, name in tracks if owner == pid} == {"phases", "steps", "dp", "ep"}
    stuck = [e for e in events if e["name"].endswith("(never returns)")]
    assert len(stuck) == 4 and all(e["dur"] > 1e6 for e in stuck)
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def write_slow(out: Path, finished: int) -> Path:
    """A run of four ranks that was slow, and of which so many finished."""
    scene = Scene(4, {"dp": range(4), "ep": range(4)})
    scene.phase("serve")
    scene.all_of(range(4), AGREE)
    for recorder in scene.recorders[:finished]:
        recorder.done()
    run_dir = RunDir(write_run(out, scene, "fault"))
    document = json.loads(run_dir.verdict.read_text()) | {"verdict": "slow", "culprits": [2]}
    write_json(run_dir.verdict, document)
    for rank in range(4):  # no hang, so nobody asked for them
        run_dir.flight_recorder(rank).unlink()
        run_dir.stack(rank).write_text("")
    return run_dir.root


def test_a_slow_run_that_ended_well_lacks_no_dumps_and_has_no_call_that_never_returns(tmp_path):
    ended, ended_by_deadline = gather(write_slow(tmp_path, 4)), gather(write_slow(tmp_path, 3))
    assert not ended.stuck and not any(text.startswith(("fr:", "stacks:")) for text in ended.missing), ended.missing
    assert ended_by_deadline.stuck and "fr: ranks 0-3 left no file" in ended_by_deadline.missing


def test_the_time_of_a_run_that_finished_ends_with_its_last_event(tmp_path):
    finished = gather(write_slow(tmp_path, 4))
    assert finished.verdict.quiet_s > 0, "else this shows nothing"
    assert finished.span_ns()[1] == max(lane.last_ns for lane in finished.lanes.values())


def test_the_arrows_of_the_trace_are_the_waits_of_the_document(tmp_path):
    """A crash has no cycle, and its ranks wait all the same."""
    root, _ = write_hang(tmp_path)
    document = json.loads((root / "verdict.json").read_text())
    write_json(root / "verdict.json", document | {"verdict": "crash", "cause": "dead_rank", "cycle": []})
    report.write(root)
    events = json.loads((root / "trace.json").read_text())["traceEvents"]
    arrows = {(e["id"], e["ph"]): e["pid"] - 1 for e in events if e.get("cat") == "waits"}
    assert arrows == {(1, "s"): 0, (1, "f"): 3, (2, "s"): 3, (2, "f"): 0}


def test_a_rank_that_is_not_in_a_call_gets_no_half_of_an_arrow(tmp_path):
    root, _ = write_hang(tmp_path)
    document = json.loads((root / "verdict.json").read_text())
    waits = [{"ranks": [0], "waits_in": "dp all_reduce #4", "for": [9], "why": ""}]
    write_json(root / "verdict.json", document | {"cycle": waits, "waits": waits})
    report.write(root)
    events = json.loads((root / "trace.json").read_text())["traceEvents"]
    assert not [e for e in events if e.get("cat") == "waits"]


def test_a_wait_for_a_lock_that_was_given_up_is_over():
    """A baton is waited for until it is gone, and then not taken."""
    made = Scene(1, {})
    for event in ("lock_wait", "lock_freed"):
        made.recorders[0].local(event, "/cache/lock")
    (wait,) = read_lane(made.witnesses()[0], Labels(), SharedClock()).spans()
    assert wait.end_ns > wait.start_ns
