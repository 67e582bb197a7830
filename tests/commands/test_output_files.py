"""What the commands write: folders and disks that refuse it, and the files of many runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_line import fails
from folders import mounted, read_only
from msgspec import structs
from reported import write_hang
from rich.console import Console
from written import written

from repro.commands.cli import main
from repro.exit_codes import CANNOT_TELL, EXPECTED, USAGE
from repro.hosts.options import WatchOptions
from repro.report.junit import write_junit
from repro.report.terminal import overview
from repro.store.run_dir import RunDir
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.format import Geometry
from repro.verdict import Verdict
from repro.watch.comparison import Comparison
from repro.watch.document import Durations, Expectation, describe, read_document
from repro.watch.live import Watch

ROOT = Path(__file__).resolve().parents[2]


def test_an_out_that_is_a_file_is_refused(capsys, tmp_path):
    out = tmp_path / "file"
    out.write_text("")
    code, error = fails(capsys, "run", "metadata_rebuild", "--out", out)
    assert code == USAGE and f"cannot write to {out}" in error


def test_a_full_disk_is_refused_and_nothing_is_left(capsys, tmp_path):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        code, error = fails(capsys, "run", "metadata_rebuild", "--out", tmp_path)
        assert code == USAGE and "no space left" in error.lower()
        assert not any(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("place", ["nowhere/it", "."])
@pytest.mark.parametrize("command", ["run metadata_rebuild --junit", "matrix --junit", "minimise idle_skip --to"])
def test_an_output_file_that_cannot_be_written_is_refused_before_the_work(
    capsys, tmp_path, monkeypatch, command, place
):
    monkeypatch.setattr("repro.lab.start.launch.run", lambda *args: pytest.fail("has begun"))
    monkeypatch.chdir(tmp_path)
    code, error = fails(capsys, *command.split(), tmp_path / place)
    assert code == USAGE and f"cannot write to {tmp_path / place}: " in error and ".partial" not in error
    assert not any(tmp_path.iterdir())


def test_a_bundle_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path):
    root, _ = write_hang(tmp_path, 2)
    code, error = fails(capsys, "bundle", root, "--to", tmp_path / "nowhere" / "it.zip")
    assert code == USAGE and f"cannot write to {tmp_path}/nowhere/it.zip: No such file or directory" in error


def test_what_is_written_beside_runs_is_named_in_a_read_only_folder(capsys, tmp_path):
    root, _ = write_hang(tmp_path, 2)
    with read_only(root):
        code, error = fails(capsys, "report", root)
        assert code == USAGE and f"cannot write to {root}/report.html: " in error
    with read_only(tmp_path):
        code, error = fails(capsys, "bundle", root)
        assert code == USAGE and f"cannot write to {root}.zip: " in error
        code, error = fails(capsys, "clean", "--out", tmp_path)
        assert code == USAGE and f"cannot remove {root}: " in error


def test_a_disk_that_fills_during_a_run_is_named_with_the_evidence(capsys, tmp_path):
    with mounted(tmp_path, "-o", "size=8m"):
        root, _ = write_hang(tmp_path, 2)
        (root / "verdict.json").unlink()
        (root / "reference.json").write_text("{}")
        with contextlib.suppress(OSError), (tmp_path / "filler").open("wb") as file:
            file.write(bytes(8 << 20))
        code, error = fails(capsys, "watch", root, "--end")
        assert code == CANNOT_TELL and f"{root}/verdict.json: No space left on device; " in error
        assert f"what is kept of the run is in {root}\n" in error


def test_a_verdict_is_written_on_a_disk_that_fills_while_the_run_is_watched(tmp_path):
    with mounted(tmp_path, "-o", "size=8m"):
        run_dir = RunDir.create(tmp_path, "metadata_rebuild", "control", 0)
        for rank in range(2):
            Recorder.open(run_dir.witness(rank), rank, 2, shape=Geometry(64, 64, 4096, 2)).done()

        def fill_the_disk(final: bool) -> Comparison:
            with contextlib.suppress(OSError), (tmp_path / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            return Comparison(evidence="all equal")

        options = WatchOptions(num_ranks=2, quiet_window_s=1.0, deadline_s=20.0)
        watch = Watch(run_dir, options, job_alive=lambda: True, compare=fill_the_disk)
        document = written(watch.run())
        del watch  # with its maps of files on the disk
        assert document["verdict"] == "clean"
        assert json.loads(run_dir.verdict.read_text())["verdict"] == "clean"
        assert not list(run_dir.root.glob(".*"))


def test_a_full_standard_output_is_called_so():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "repro", "list"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (CANNOT_TELL, "repro: standard output: No space left on device\n")


def decided(scenario, variant, verdict, **more):
    document = describe(
        Verdict(verdict, "extra", (1, 2), evidence=("rank 1: \x1b[31mred",)),
        scenario=scenario,
        variant=variant,
        num_ranks=8,
        expected=Expectation("clean", None),
        matches_expected=False,
        seconds=Durations(1.1, 3.5),
    )
    return structs.replace(document, sentences=("rank 1 waits",), **more)


def test_junit_tells_a_wrong_verdict_from_none_and_from_what_was_not_run(tmp_path):
    documents = [
        decided("a_scenario", "control", "clean", matches_expected=True),
        decided("a_scenario", "fault", "slow"),
        decided("a_scenario", "fix", "inconclusive"),
        decided("needs_a_gpu", "fault", "inconclusive", skipped="no GPU here"),
    ]
    write_junit(tmp_path / "junit.xml", documents)
    first, second = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert {key: first.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3", "failures": "1", "errors": "1", "skipped": "0",
    }  # fmt: skip
    assert second.get("skipped") == "1" and second[0][0].get("message") == "no GPU here"
    assert first[1].find("failure") is not None and "\x1b" not in first[1].find("system-out").text


def test_what_is_unsafe_about_many_runs_is_told_once(capsys, tmp_path, monkeypatch):
    def run(settings, out, *rest):
        return RunDir(out), decided(settings.scenario, settings.variant, "clean", matches_expected=True)

    monkeypatch.setattr("repro.lab.start.launch.run", run)
    monkeypatch.setattr("repro.commands.run.write_reports", lambda *args: None)
    monkeypatch.setattr("repro.lab.scenarios.names", lambda: ["idle_skip", "metadata_rebuild", "zero_token_return"])
    assert main(["run", "all", "--out", str(tmp_path)]) == EXPECTED
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unsafe: ")]
    assert len(lines) == 1 and "expert parallelism is not supported" in lines[0]


def test_every_run_of_a_matrix_gets_a_report_and_a_case_in_the_junit_file(capsys, tmp_path, monkeypatch):
    def run(settings, out, *rest):
        root, _ = write_hang(out, settings.num_ranks)
        return RunDir(root), read_document(root / "verdict.json")

    monkeypatch.setattr("repro.lab.start.launch.run", run)
    command = ["matrix", "--only", "TP8 jit cold", "--out", str(tmp_path), "--junit", str(tmp_path / "j.xml"), "--json"]
    assert main(command) == EXPECTED
    documents = json.loads(capsys.readouterr().out)
    assert len(documents) >= 2
    assert len(list(tmp_path.glob("*-0/report.html"))) == len(documents)
    names = [case.get("name") for case in ElementTree.parse(tmp_path / "j.xml").iter("testcase")]
    assert len(set(names)) == len(documents) and all("TP8" in name and "cold" in name for name in names), names


def test_the_table_of_several_scenarios_is_aligned_and_cut_nowhere(capsys):
    documents = [
        decided("a_scenario_of_a_long_name", "control", "clean", matches_expected=True),
        decided("another", "fault", "deadlock", culprits=(0, 2, 4, 6)),
    ]
    overview(Console(width=40), documents)
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert rows[0].index("clean") == rows[1].index("deadlock, extra") == header.index("verdict")
    assert rows[0].index("yes") == rows[1].index("NO") == header.index("as expected")
    assert "another fault: rank 1 waits" in rows and "1 of 2 as expected, 7 s" in rows
