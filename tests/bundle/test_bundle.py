"""The bundle: complete, checkable, judged again elsewhere, free of what was to be removed, and safe to open."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from forked import run_forked
from reported import AGREE, document, write_hang, write_run
from scene import Scene, make_recorder

from hybrid_moe_ref.config import preset
from hybrid_moe_ref.parallel.observer import Collective
from repro import bundle
from repro.bundle import archive, assemble, scratch
from repro.bundle.archive import unpack
from repro.bundle.issue import MAX_ISSUE_LINES, issue
from repro.bundle.scratch import scratch_folder
from repro.commands.cli import main
from repro.exit_codes import EXPECTED, UNEXPECTED, USAGE
from repro.hosts.interrupt import Interrupt
from repro.lab.description import describe
from repro.lab.settings import RunSettings
from repro.report.gather import gather
from repro.store.run_dir import RunDir, write_json
from repro.trace.witness.file import parse
from repro.trace.witness.format import Geometry, pack_header
from repro.trace.witness.parse import parse_header
from repro.verdict import judge

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch):
    """Without torch's collect_env, which takes seconds and has a test of its own."""
    monkeypatch.setattr(assemble, "_environment", lambda recogniser: "not asked\n")


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_bundle_holds_everything_and_verifies(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == EXPECTED
    printed = capsys.readouterr().out
    assert "left out or replaced 8: names and boot ids of hosts" in printed and "--with-logs adds" in printed
    names = set(contents(tmp_path / "b.zip"))
    assert names >= {
        "ISSUE.md", "COMMANDS.sh", "MANIFEST.json", "config.json", "verdict.json", "env.txt", "repro.py", "report.html",
        "timeline.svg", "trace.json", "events/rank000.wit", "fr/rank003.json", "stacks/rank003.txt", "logs/rank000.log",
    }  # fmt: skip
    assert (tmp_path / "b.zip").stat().st_size < 5_000_000
    assert main(["bundle", "--verify", str(tmp_path / "b.zip")]) == EXPECTED


def test_control_and_fix_lie_in_folders_of_their_own(tmp_path, quick):
    write_hang(tmp_path)
    for variant in ("control", "fix"):
        scene = Scene(4, {"dp": range(4)})
        for recorder in scene.recorders:
            recorder.done()
        other = write_run(tmp_path, scene, variant)
        (other / "env" / "rank000.txt").write_text("torch: 1\n")
    made = bundle.make(other, tmp_path / "b.zip")
    names = contents(made.path).keys()
    for variant in ("control", "fix"):
        assert {f"{variant}/{name}" for name in ("config.json", "verdict.json", "events/rank003.wit")} <= names
        assert {f"{variant}/{name}" for name in ("env/rank000.txt", "report.html", "logs/rank000.log")} <= names
    assert b"--config" not in contents(made.path)["COMMANDS.sh"]
    page = contents(made.path)["fix/report.html"].decode()
    assert (
        "python -m repro watch bundle/fix" in page
        and "python -m repro watch bundle<" in contents(made.path)["report.html"].decode()
    )


def changed(root: Path, **verdict) -> Path:
    """The run with other words in its verdict."""
    path = root / "verdict.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | verdict))
    return root


@pytest.mark.parametrize("scenario", ["metadata_rebuild", "group_order"])
@pytest.mark.parametrize(
    ("verdict", "cause", "why"),
    [
        (
            "slow",
            None,
            "the verdict is slow; only a deadlock can be replayed, because it follows from the order",
        ),
        ("crash", "dead_rank", "the verdict is crash"),
        ("clean", None, "the verdict is clean"),
        ("inconclusive", None, "the verdict is inconclusive"),
        ("", None, "there is no verdict"),
        ("deadlock", "sizes", "a race in the backend decides whether the ranks hang"),
    ],
)
def test_what_no_replay_brings_back_has_no_file_that_claims_to(tmp_path, quick, scenario, verdict, cause, why):
    root = changed(write_hang(tmp_path)[0], scenario=scenario, verdict=verdict, cause=cause)
    if not verdict:  # the run was interrupted before there was one
        (root / "verdict.json").unlink()
    made = bundle.make(root, tmp_path / "b.zip")
    files = contents(made.path)
    assert "repro.py" not in files and any(n.startswith("no repro.py: ") and why in n for n in made.notes), made.notes
    for name in ("ISSUE.md", "COMMANDS.sh"):
        assert b"repro.py" not in files[name] and b"--fix" not in files[name] and b"one file" not in files[name]
    last_line = files["ISSUE.md"].decode().splitlines()[-1]
    assert "control/" not in last_line and ("verdict.json" in last_line) == bool(verdict)


@pytest.mark.parametrize(("fix", "offered"), [("none", False), ("clean", True), ("crash", False), ("torn", False)])
def test_the_cure_is_offered_only_where_a_run_of_it_can_be_replayed(tmp_path, quick, fix, offered):
    root = changed(write_hang(tmp_path)[0], scenario="group_order")
    if fix != "none":
        scene = Scene(4, {"dp": range(4)})
        scene.begin_step(0, [], range(4))
        scene.all_of(range(4), AGREE)
        for recorder in scene.recorders:
            recorder.done()
        cured = write_run(tmp_path, scene, "fix")
        if fix == "crash":
            changed(cured, verdict="crash")
        if fix == "torn":
            (cured / "events" / "rank003.wit").unlink()
    made = bundle.make(root, tmp_path / "b.zip")
    files = contents(made.path)
    source = files["repro.py"].decode()
    assert ("--fix" in source) == ("run with the fix" in source) == (b"--fix" in files["ISSUE.md"]) == offered
    assert ("fix/" in files["ISSUE.md"].decode().splitlines()[-1]) == (fix != "none")
    torn = "repro.py has no --fix: fix: the witnesses of some ranks are missing; there are only 3"
    assert (torn in made.notes) == (fix == "torn")
    ast.parse(source)


def test_its_verdict_is_recomputed_from_its_witnesses(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    main(["watch", str(root), "--json"])
    here = json.loads(capsys.readouterr().out)
    made = bundle.make(root, tmp_path / "b.zip")
    root.rename(tmp_path / "gone")
    code = main(["watch", str(made.path), "--json"])
    there = json.loads(capsys.readouterr().out)
    assert code in (EXPECTED, UNEXPECTED)
    for key in ("verdict", "cause", "culprits", "cycle"):
        assert here[key] == there[key], key
    assert (there["verdict"], there["cause"], there["culprits"]) == ("deadlock", "extra", [0, 1, 2])


def test_the_issue_is_short_and_marks_up_nothing_of_a_strangers(tmp_path):
    root, _ = write_hang(tmp_path, layer="<img src=x>`|[a](b)" + "y" * 500)
    text = issue(gather(root), [])
    assert len(text.splitlines()) <= MAX_ISSUE_LINES and len(text) < 10_000
    assert "<img" not in text and "\\[a" in text and "`|" not in text
    assert "deadlock" in text and "Culprits: ranks 0-2" in text and "python -m repro run metadata_rebuild" in text


def test_the_bundle_of_a_damaged_run_says_what_was_left_out(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    (root / "events" / "rank001.wit").write_bytes(b"x" * 100)
    empty = pack_header(parse_header((root / "events" / "rank002.wit").read_bytes(), "")[0], Geometry())
    (root / "events" / "rank002.wit").write_bytes(empty.ljust(Geometry().file_bytes, b"\0"))
    (root / "fr" / "rank001.json").write_text("{")
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == EXPECTED
    printed = capsys.readouterr().out
    assert "events/rank001.wit is left out" in printed and "fr/rank001.json is left out: fr/rank001.json:1:" in printed
    assert "left out or replaced 2: files" in printed


def test_what_is_no_file_is_left_out_with_a_note_and_not_waited_for(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    pipes = ["events/rank002.wit", "fr/rank002.json", "stacks/rank002.txt", "logs/rank002.log", "logs/launcher.log"]
    for name in pipes:  # nobody writes to them, so a reader that waits for one waits for ever
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)
    (root / "logs" / "rank003.log").unlink()
    (root / "logs" / "rank003.log").symlink_to("/etc/passwd")
    (root / "env" / "rank003.txt").mkdir()
    assert main(["report", str(root)]) == EXPECTED
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == EXPECTED
    text = capsys.readouterr().out
    for name in (*pipes, "env/rank003.txt"):
        assert f"{name} is left out: {name}:0: not a regular file" in text
    assert "logs/rank003.log is left out: a link" in text
    assert not contents(tmp_path / "b.zip").keys() & {*pipes, "logs/rank003.log", "env/rank003.txt"}


def test_a_signal_while_a_scratch_folder_is_made_leaves_none(tmp_path, monkeypatch):
    """Each moment from the folder's making on: a signal between two steps must find somebody who removes it."""
    make = tempfile.mkdtemp

    def make_and_signal(**options):
        folder = make(dir=tmp_path, **options)
        signal.raise_signal(signal.SIGTERM)
        return folder

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", make_and_signal)
    with pytest.raises(KeyboardInterrupt), Interrupt().installed(), scratch_folder("repro-"):
        pytest.fail("the signal was lost")
    assert not list(tmp_path.iterdir())
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_bundle_that_nobody_could_open_is_not_made(tmp_path, quick, monkeypatch, capsys):
    root, _ = write_hang(tmp_path)
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 1000)
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == USAGE
    assert " unpack to " in capsys.readouterr().err and not (tmp_path / "b.zip").exists()


def test_the_same_run_gives_the_same_bytes(tmp_path, quick):
    root, _ = write_hang(tmp_path)
    first = bundle.make(root, tmp_path / "a.zip").path.read_bytes()
    assert bundle.make(root, tmp_path / "b.zip").path.read_bytes() == first


def test_bundles_never_import_torch():
    code = "import sys, repro.bundle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_bundle_of_8_ranks_is_verified_judged_and_run_again_in_another_clone_with_an_empty_home(tmp_path):
    documents = {}
    for variant in ("control", "fault", "fix"):
        settings = RunSettings("metadata_rebuild", variant)
        run_dir, documents[variant] = run_forked(settings, tmp_path / "runs")
    made = bundle.make(run_dir.root)
    assert made.size < 5_000_000
    files = contents(made.path)
    assert {f"{folder}/{name}" for folder in ("control", "fix") for name in assemble._FILES} <= files.keys()
    assert {f"{folder}env/rank007.txt" for folder in ("", "control/", "fix/")} <= files.keys()
    assert b"PyTorch version:" in files["env.txt"]
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    if subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)]).returncode:
        pytest.skip("not in a git repository")
    (clone / ".venv").symlink_to(sys.prefix)  # in place of `make setup`
    (clone / "bundle").mkdir()
    unpack(made.path, clone / "bundle")

    def there(*words) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=clone, env={"HOME": str(home), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip

    python = str(clone / ".venv/bin/python")
    assert there(python, "-m", "repro", "bundle", "--verify", str(made.path)).returncode == 0
    judged = json.loads(there(python, "-m", "repro", "watch", str(made.path), "--json").stdout)
    ran = there("sh", "bundle/COMMANDS.sh")
    commands = [line for line in ran.stdout.splitlines() if line.startswith("+ ")]
    codes = [line for line in ran.stdout.splitlines() if line.startswith("exit code ")]
    assert len(commands) == 5, ran.stdout + ran.stderr
    assert codes == [f"exit code {code}" for code in (0, 0, 0, 1, 1)], ran.stdout + ran.stderr
    verdicts = [json.loads(path.read_text()) for path in sorted((clone / "runs").glob("*-fault-0/verdict.json"))]
    assert len(verdicts) == 3, "by run, with control and fix, and by torchrun"
    for key in ("verdict", "cause", "culprits"):
        assert all(documents["fault"][key] == other[key] for other in (judged, *verdicts)), key


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("moment", ["at work", "at the end"])
def test_a_signal_leaves_no_temporary_folder(tmp_path, quick, monkeypatch, number, moment):
    root, _ = write_hang(tmp_path / "runs")
    made = bundle.make(root, tmp_path / "b.zip")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    remove, sent = shutil.rmtree, []

    def interrupted(*args, **options):
        assert any(scratch.iterdir())
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return remove(*args, **options)

    for module, name in (
        ((shutil, "rmtree"),) if moment == "at the end" else ((archive, "unpack"), (assemble, "_judge"))
    ):
        monkeypatch.setattr(module, name, interrupted)
    for command in (["watch", str(made.path)], ["bundle", "--verify", str(made.path)], ["bundle", str(root)]):
        sent.clear()
        assert main(command) == 130
        assert sent and not any(scratch.iterdir()), command


@pytest.mark.full
@pytest.mark.timeout(600)
def test_1024_ranks_fit_in_one_bundle(tmp_path, quick):
    """Witnesses are preallocated to 2.8 MB each; most of that is empty and stays out."""
    num_ranks = 1024
    members, layer = tuple(range(num_ranks)), "layers.0.moe"
    run_dir = RunDir.create(tmp_path / "runs", "metadata_rebuild", "fault", 0)
    model = dataclasses.replace(preset("tiny"), num_experts=num_ranks)
    settings = RunSettings("metadata_rebuild", num_ranks=num_ranks, model=model)
    write_json(run_dir.description, describe(settings).to_mapping())
    write_json(run_dir.config, settings.to_mapping())
    ticks = itertools.count(10**9, 1000)
    witnesses = {}
    for rank in members:
        data, recorder = make_recorder(rank, num_ranks, lambda: next(ticks), Geometry())
        recorder.groups({"dp": members, "ep": members})
        recorder.phase("serve")
        for seq in range(200):
            recorder.enter(collective := Collective("dp", "all_reduce", "step", (64,), "int32", "sum"))
            if rank or seq < 199:
                recorder.leave(collective)
        recorder.enter(Collective("ep", "all_gather_v", layer, (1,) * num_ranks, "uint8"))
        run_dir.witness(rank).write_bytes(data)
        witnesses[rank] = parse(bytes(data), f"rank{rank:03d}.wit")
    verdict = judge(witnesses, num_ranks=num_ranks, now_ns=next(ticks) + 2 * 10**9, quiet_window_s=1.0)
    write_json(run_dir.verdict, document(verdict, num_ranks, "fault"))
    del witnesses, data, recorder
    made = bundle.make(run_dir.root, tmp_path / "b.zip")
    assert not [note for note in made.notes if "left out" in note or "by the bundle" in note], made.notes
    assert made.size < 100_000_000
    with bundle.opened(made.path) as root:
        assert len(list((root / "events").glob("*.wit"))) == num_ranks
