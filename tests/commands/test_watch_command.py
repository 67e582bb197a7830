"""`repro watch`: the verdict on the files that a run left, whole, damaged or of several clocks."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from dataclasses import replace

import pytest
from command_line import fails
from scene import Scene
from written import written

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.commands.cli import main
from repro.exit_codes import CANNOT_TELL, EXPECTED, UNEXPECTED, USAGE
from repro.lab.outcome.expectation import document_of, watch_options
from repro.lab.outcome.second_judgement import judge_again
from repro.lab.outcome.tokens import compare_tokens
from repro.lab.settings import RunSettings
from repro.store.run_dir import RunDir, write_json
from repro.store.schema import to_json
from repro.trace.identity import myself
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import create
from repro.trace.witness.format import Geometry, Identity, pack_header
from repro.trace.witness.parse import parse_header
from repro.verdict import Facts
from repro.watch.document import Durations, Watcher
from repro.watch.live import Watch
from repro.watch.look import Look


@pytest.fixture(autouse=True)
def short_look(monkeypatch):
    """Nothing runs here that a look of half a second could find at work."""
    monkeypatch.setattr("repro.watch.offline.LOOK_S", 0.05)


def test_a_decided_run_is_not_decided_again(capsys, tmp_path):
    settings = RunSettings("metadata_rebuild")
    (tmp_path / "config.json").write_text(json.dumps(settings.to_mapping()))
    (tmp_path / "verdict.json").write_text('{"verdict": "deadlock"}')
    code, error = fails(capsys, "watch", tmp_path, "--end")
    assert code == USAGE and "has a verdict" in error
    assert (tmp_path / "verdict.json").read_text() == '{"verdict": "deadlock"}'


@pytest.mark.parametrize("key", ["deadline_s", "seed"])
def test_numbers_without_measure_are_refused_by_watch(capsys, tmp_path, key):
    run_dir = left_by_a_run(tmp_path, finished())
    run_dir.config.write_text(json.dumps(json.loads(run_dir.config.read_text()) | {key: 10**400}))
    code, _ = fails(capsys, "watch", tmp_path)
    assert code == USAGE


def decided(**changes):
    """What of a verdict.json a second judgement uses, so changed."""
    entries = {"verdict": "clean", "confidence": "certain", "culprits": [], "evidence": [], "quiet_s": 1.0}
    return json.dumps({**entries, "seconds": {}, "system": {}, **changes}).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Expecting value"),
        (b"{}", r"\$: object missing required field verdict"),
        (b"[]", r"\$: expected object, got array"),
        (b'{"verdict": 5}', r"\$.verdict: expected str, got int"),
        (b'{"verdict": "deadlock"}', "missing required field culprits"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (decided()[:-9], "Unterminated string"),
        (decided(quiet_s=10**400), r"\$.quiet_s: number out of range"),
        (decided(culprits=["0"]), r"\$.culprits\[0\]: expected int, got str"),
        (decided(evidence=[5]), r"\$.evidence\[0\]: expected str, got int"),
        (decided(system={"alive": 3}), r"\$.system.alive: expected object, got int"),
    ],
)
def test_a_run_with_a_damaged_verdict_is_judged_by_its_witnesses(capsys, tmp_path, data, words):
    run_dir = left_by_a_run(tmp_path, finished())
    run_dir.verdict.write_bytes(data)
    assert main(["watch", str(tmp_path)]) == CANNOT_TELL
    captured = capsys.readouterr()
    assert captured.out.startswith("clean\n") and not captured.err
    (line,) = [line for line in captured.out.splitlines() if "verdict.json:" in line]
    assert re.match(rf"verdict\.json:\d+: .*{words}.*; the run is judged as if it had no", line)


def test_a_whole_verdict_is_no_damage(capsys, tmp_path):
    left_by_a_run(tmp_path, finished()).verdict.write_bytes(decided())
    assert main(["watch", str(tmp_path)]) == EXPECTED


def left_by_a_run(root, scene):
    """A run directory of a control run with the witnesses of a scene."""
    settings = RunSettings("metadata_rebuild", "control", num_ranks=scene.num_ranks)
    run_dir = RunDir(root)
    (root / "events").mkdir()
    run_dir.config.write_text(json.dumps(settings.to_mapping()))
    (root / "outputs").mkdir()
    run_dir.reference.write_text('{"a": [1, 2]}')
    for rank, data in enumerate(scene.files):
        run_dir.witness(rank).write_bytes(data)
        run_dir.output(rank).write_text('{"a": [1, 2]}' if rank == 0 else "{}")
    return run_dir


def finished():
    scene = Scene(4, {"dp": range(4)})
    for recorder in scene.recorders:
        recorder.done()
    return scene


def watching(run_dir, settings, reference_alive):
    return Watch(
        run_dir,
        watch_options(settings),
        job_alive=lambda: True,
        compare=lambda final: compare_tokens(
            run_dir, settings.num_ranks, settings.tp_size, lambda: reference_alive, final
        ),
        describe=lambda verdict: document_of(settings, verdict),
    )


def test_watch_exits_with_0_for_the_expected_verdict_1_for_another_and_125_for_none(capsys, tmp_path):
    run_dir = left_by_a_run(tmp_path, finished())
    assert main(["watch", str(tmp_path)]) == EXPECTED
    assert capsys.readouterr().out.startswith("clean\n")
    scene = finished()
    scene.enter([0], Collective("dp", "all_reduce", "step", (4,), "int32", "sum"))
    run_dir.witness(0).write_bytes(scene.files[0])
    assert main(["watch", str(tmp_path)]) == UNEXPECTED
    assert capsys.readouterr().out.startswith("deadlock (skipped)\n")
    run_dir.witness(0).unlink()
    assert main(["watch", str(tmp_path), "--json"]) == CANNOT_TELL
    answer = json.loads(capsys.readouterr().out)
    assert (answer["verdict"], answer["cause"], answer["schema_version"]) == ("inconclusive", None, 1)
    contract = "scenario variant backend num_ranks seed culprits ranks first_divergence cycle evidence expected seconds"
    assert {*contract.split(), "matches_expected"} <= answer.keys()


def test_a_run_whose_numbers_nobody_compared_is_not_clean(capsys, tmp_path):
    run_dir = left_by_a_run(tmp_path, finished())
    run_dir.output(3).unlink()
    assert main(["watch", str(tmp_path)]) == CANNOT_TELL
    lines = capsys.readouterr().out.splitlines()
    assert "the output of rank 3 is missing, so the tokens were not compared" in lines
    whole = run_dir.reference.read_text()
    run_dir.reference.unlink()
    assert main(["watch", str(tmp_path)]) == CANNOT_TELL
    lines = capsys.readouterr().out.splitlines()
    assert "reference.json is missing and the output of rank 3 is missing, so the tokens were not compared" in lines
    run_dir.reference.write_text(whole)
    run_dir.output(3).write_text('{"a": [1, 3]}')
    assert main(["watch", str(tmp_path)]) == UNEXPECTED
    assert capsys.readouterr().out.startswith("corrupt\n")


@pytest.mark.parametrize("name", ["reference.json", "outputs/rank002.json"])
@pytest.mark.parametrize(
    ("data", "words"), [("{", "Expecting"), ("[]", "the content does not map requests to lists of tokens")]
)
def test_a_damaged_file_of_tokens_is_named_and_the_run_still_judged(capsys, tmp_path, name, data, words):
    run_dir = left_by_a_run(tmp_path, finished())
    (tmp_path / name).write_text(data)
    assert main(["watch", str(tmp_path)]) == CANNOT_TELL
    captured = capsys.readouterr()
    assert captured.out.startswith("inconclusive\n") and not captured.err
    assert f"\n{name}:1: {words}" in captured.out and "so the tokens were not compared" in captured.out
    settings = RunSettings("metadata_rebuild", "control", num_ranks=4)
    document = watching(run_dir, settings, reference_alive=False).run()
    document = written(document)
    assert document["verdict"] == "inconclusive" and document["evidence"][-1].startswith(f"{name}:1: {words}")


@pytest.mark.parametrize(("reference", "verdict"), [(True, "clean"), (False, "inconclusive")])
def test_what_was_not_compared_by_the_deadline_is_not_clean(tmp_path, reference, verdict):
    run_dir = left_by_a_run(tmp_path, finished())
    if not reference:
        run_dir.reference.unlink()
    settings = RunSettings("metadata_rebuild", "control", num_ranks=4, deadline_s=0.2)
    watch = watching(run_dir, settings, reference_alive=True)
    watch.started_ns -= 10**9
    document = written(watch.run())
    assert document["verdict"] == verdict, document
    assert any("deadline" in line for line in document["evidence"]), document


def test_ranks_of_hosts_whose_clocks_have_nothing_in_common_are_judged_in_time(tmp_path):
    """One host has been up for twelve days longer than this one, another for half as long."""
    call = Collective("dp", "all_reduce", "step", (4,), "int32", "sum")
    files = []
    for rank, ahead_ns in enumerate((0, 0, 10**15, -(time.monotonic_ns() // 2))):
        writer = replace(myself(rank, 4), run_id="test", pid=2**22 + 1 + rank)
        if ahead_ns:
            offset_ns = writer.wall_offset_ns - ahead_ns
            writer = replace(writer, boot_id=f"boot{rank}", hostname=f"host{rank}", wall_offset_ns=offset_ns)
        data = bytearray(Geometry().file_bytes)
        header = pack_header(writer, Geometry())
        data[: len(header)] = header
        recorder = Recorder(data, writer, Geometry(), clock=lambda ahead_ns=ahead_ns: time.monotonic_ns() + ahead_ns)
        recorder.groups({"dp": range(4), "ep": range(4)})
        recorder.enter(call if rank < 3 else call._replace(group="ep"))
        files.append(data)
    scene = finished()
    scene.files = files
    run_dir = left_by_a_run(tmp_path, scene)
    settings = RunSettings("metadata_rebuild", "control", num_ranks=4, quiet_window_s=0.3, deadline_s=20)
    watch = watching(run_dir, settings, reference_alive=False)
    watch.processes = watch._running = lambda: {}
    document = written(watch.run())
    assert (document["verdict"], document["cause"]) == ("deadlock", None), document
    assert "times of 2 ranks on other hosts are converted" in " ".join(document["evidence"]), document
    assert 0.3 <= document["seconds"]["stall_to_verdict"] <= document["seconds"]["total"] < 25, document
    assert judge_again(run_dir, settings)[0].verdict == "deadlock"


def newer(data):
    data[8] = 9


def empty(data):
    data.clear()


def cut(data):
    del data[len(data) // 2 :]


def impossible(data):
    data[finished_shape().ring_at + 20] = 99  # the kind of the first record


def of_another_run(data):
    data[:] = Scene(4, {"dp": range(4)}, run_id="another").files[2]


def finished_shape():
    return parse_header(bytes(finished().files[0]), "x")[1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (empty, "rank002.wit:0: the file ends inside its header"),
        (newer, "rank002.wit:8: the witness has version 9, but this release reads only version 2"),
        (cut, "rank002.wit:{half}: damage: the file ends early"),
        (impossible, "rank002.wit:{ring}: damage: event 1 does not match its checksum"),
        (of_another_run, "rank002.wit:0: the file belongs to run 'another' of 4 ranks, not to 'test'"),
    ],
)
def test_a_bad_witness_is_named_with_its_offset_and_the_rest_is_still_used(capsys, tmp_path, damage, words):
    scene = finished()
    scene.files[2] = bytearray(bytes(scene.files[2]))  # a copy that no recorder holds on to
    damage(scene.files[2])
    left_by_a_run(tmp_path, scene)
    words = words.format(half=len(scene.files[2]), ring=finished_shape().ring_at)
    for flags in ([], ["--json"]):
        assert main(["watch", str(tmp_path), *flags]) == CANNOT_TELL
        captured = capsys.readouterr()
        assert words in captured.out and not captured.err
    assert [position["state"] for position in json.loads(captured.out)["ranks"]].count("done") >= 3


@pytest.mark.parametrize("twentieth", [3, *(pytest.param(n, marks=pytest.mark.full) for n in range(20) if n != 3)])
def test_a_witness_cut_anywhere_never_ends_in_a_traceback_or_a_wrong_culprit(capsys, tmp_path, twentieth):
    scene = Scene(4, {"dp": range(4), "ep": range(4)})
    reduce, gather = Collective("dp", "all_reduce", "", (4,)), Collective("ep", "all_gather_v", "l", (1, 1, 1, 1))
    scene.begin_step(1, (ScheduleEntry("dp", "all_reduce"), ScheduleEntry("ep", "all_gather_v", "l")))
    scene.all_of(range(4), reduce)
    scene.enter([0, 1, 3], gather)
    scene.enter([2], reduce._replace(layer="extra"))
    used = 1024 + 16 * 128 + 12 * 72  # header, slots and the records that there are; then the rest of the file
    whole = len(scene.files[2])
    cut = used * twentieth // 10 if twentieth < 10 else used + (whole - used) * (twentieth - 10) // 10
    scene.files[2] = scene.files[2][:cut]
    left_by_a_run(tmp_path, scene)
    assert main(["watch", str(tmp_path), "--json"]) == CANNOT_TELL
    captured = capsys.readouterr()
    assert not captured.err and "rank002.wit" in " ".join(json.loads(captured.out)["evidence"])
    assert set(json.loads(captured.out)["culprits"]) <= {2}


@pytest.mark.parametrize("end", [False, True])
def test_a_run_whose_launcher_was_killed_before_a_rank_began_names_nobody(capsys, tmp_path, end):
    """Nor is it slow for ever; and what a killed process was writing goes when the run is ended."""
    run_dir = left_by_a_run(tmp_path, finished())
    settings = RunSettings("metadata_rebuild", "fault", num_ranks=4, deadline_s=0.1)
    run_dir.config.write_text(json.dumps(settings.to_mapping()))
    for rank in range(4):
        run_dir.witness(rank).unlink()
        create(run_dir.witness(rank), Identity(rank, 4))
    (tmp_path / "env").mkdir()
    partial = tmp_path / "env" / ".rank002.txt.123.partial"
    leftovers = [partial, tmp_path / "store", tmp_path / "tmp" / "x"]
    leftovers[2].parent.mkdir()
    for path in leftovers:
        path.touch()
    assert main(["watch", str(tmp_path), "--json", *(["--end"] if end else [])]) == CANNOT_TELL
    document = json.loads(capsys.readouterr().out)
    document = document[0] if end else document
    assert (document["verdict"], document["culprits"], document["suspects"]) == ("inconclusive", [], []), document
    assert "no rank has begun: look at the launcher's log for the reason" in document["evidence"]
    assert end or any("no process was found that watches it" in line for line in document["evidence"]), document
    assert [path.exists() for path in leftovers] == [not end] * 3


def test_a_death_and_a_failure_are_in_one_order_wherever_the_run_is_judged_again(tmp_path):
    """The clock of the watcher, which verdict.json names, stood at another time than this one's."""
    for up_s in (100, 2_000_000):
        root = tmp_path / str(up_s)
        root.mkdir()
        scene = Scene(4, {"dp": range(4)})
        scene.now_ns = up_s * 10**9
        scene.enter([0, 1], Collective("dp", "all_reduce", "step", (4,), "int32", "sum"))
        died_s = scene.now_ns / 1e9 + 0.05
        scene.now_ns += 5 * 10**9
        scene.recorders[2].failed("RuntimeError: peer 3 is gone")
        facts = Facts(alive={0: True, 1: True, 2: True, 3: False}, died={3: died_s})
        watcher = Identity(0, 1, hostname="host0", boot_id="boot0", wall_offset_ns=10**18)
        look = Look(watcher, scene.now_ns + 1_500_000_000, scene.witnesses(), facts)
        run_dir = left_by_a_run(root, scene)
        settings = RunSettings("metadata_rebuild", "control", num_ranks=4)
        verdict = look.verdict(watch_options(settings))
        seen = {"watcher": Watcher.of(look), "system": facts, "seconds": Durations(1.5, 9.0)}
        document = document_of(settings, verdict, **seen)
        write_json(run_dir.verdict, to_json(document))
        again, _ = judge_again(run_dir, settings)
        assert (verdict.verdict, verdict.culprits) == ("crash", (3,)), verdict
        assert (again.verdict, again.cause, again.culprits) == ("crash", "dead_rank", (3,)), again
        assert again.watcher == document.watcher and again.quiet_s == document.quiet_s


def test_only_one_process_may_watch_a_run_to_its_end(capsys, tmp_path):
    run_dir = left_by_a_run(tmp_path, finished())
    with run_dir.config.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, error = fails(capsys, "watch", tmp_path, "--end")
    assert code == USAGE and f"process {os.getpid()} watches this run to its end" in error
    assert not run_dir.verdict.exists()
