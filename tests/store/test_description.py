"""run.json: written once, read strictly, enough for report and bundle, and never in their way."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest
from reported import AGREE, write_hang, write_run
from scene import Scene

from hybrid_moe_ref.files import DamagedFile
from repro import bundle, report
from repro.bundle import assemble
from repro.bundle.redact import documents
from repro.bundle.redact.recognise import Recogniser
from repro.commands.cli import main
from repro.exit_codes import EXPECTED
from repro.lab.description import describe
from repro.lab.scenarios import settings_of
from repro.lab.start.prepare import prepare_run_dir
from repro.report.gather import gather, siblings
from repro.store.description import RUN_FOLDER, Command, RunDescription, read_description
from repro.store.run_dir import write_json

HANG = {"scenario": "metadata_rebuild", "variant": "fault"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without torch's collect_env, which takes seconds."""
    monkeypatch.setattr(assemble, "_environment", lambda recogniser: "not asked\n")


def unpacked(path: Path, name: str) -> str:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name).decode()


def test_the_launcher_writes_the_description_that_readers_read(tmp_path):
    settings = settings_of({**HANG, "num_ranks": 2, "seed": 5})
    run_dir = prepare_run_dir(tmp_path, settings)
    described = read_description(run_dir.description)
    assert described == describe(settings)
    assert (described.title, described.variant, described.num_ranks) == ("metadata_rebuild", "fault", 2)
    assert described.source == "ROCm/ATOM#1690" and described.mechanism


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"title": 5}, "run.json:1: title: wanted str"),
        ({"num_ranks": 0}, "run.json:1: num_ranks: 0 is not a number of ranks"),
        ({"num_ranks": True}, "run.json:1: num_ranks: wanted int"),
        ({"quiet_window_s": -1.0}, "run.json:1: quiet_window_s: -1.0 is not a number of seconds"),
        ({"variant": "broken"}, "run.json:1: variant: unknown variant 'broken'"),
        ({"commands": [{"purpose": "a", "words": ["b", 3]}]}, "run.json:1: commands[0].words[1]: wanted str"),
        (
            {"commands": [{"purpose": "a", "words": ["b"]}] * 99},
            "run.json:1: commands: there are 99, but at most 16 are allowed",
        ),
        ({"schema_version": 2}, "run.json:1: schema_version: 2 is not a version that this release reads"),
        ({"colour": "red"}, "run.json:1: colour: unknown key"),
    ],
)
def test_a_damaged_description_is_refused_with_its_path_and_field(tmp_path, change, words):
    write_json(tmp_path / "run.json", describe(settings_of(HANG)).to_mapping() | change)
    with pytest.raises(DamagedFile) as caught:
        read_description(tmp_path / "run.json")
    assert words in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_the_folder_of_a_run_is_put_where_a_command_names_it():
    command = Command("", ("watch", RUN_FOLDER, f"{RUN_FOLDER}/config.json", f"{RUN_FOLDER}s", "a{run}"))
    assert command.filled("my run") == ("watch", "my run", "my run/config.json", "{run}s", "a{run}")


def test_runs_that_differ_in_variant_and_checks_only_are_one_family():
    one = settings_of(HANG)
    family = describe(one).family
    assert describe(dataclasses.replace(one, variant="fix", checks="strict")).family == family
    for change in ({"seed": 1}, {"num_ranks": 4}, {"deadline_s": 5.0}):
        assert describe(dataclasses.replace(one, **change)).family != family, change


def finished(out: Path, variant: str) -> Path:
    scene = Scene(4, {"dp": range(4)})
    scene.all_of(range(4), AGREE)
    for recorder in scene.recorders:
        recorder.done()
    return write_run(out, scene, variant)


def test_runs_stand_beside_each_other_by_family_alone(tmp_path):
    root, _ = write_hang(tmp_path)
    control = finished(tmp_path, "control")
    assert siblings(root, gather(root)) == [control]
    described = read_description(control / "run.json")
    write_json(control / "run.json", dataclasses.replace(described, family="another").to_mapping())
    assert siblings(root, gather(root)) == []
    write_json(root / "run.json", dataclasses.replace(described, family="").to_mapping())
    write_json(control / "run.json", dataclasses.replace(described, family="", variant="fix").to_mapping())
    assert siblings(root, gather(root)) == []


@pytest.mark.parametrize("damage", ["", "{", '{"title": "x"}'])
def test_a_run_without_a_sound_description_still_has_a_report_and_a_bundle(tmp_path, damage):
    root, _ = write_hang(tmp_path)
    (root / "run.json").write_text(damage)
    if not damage:
        (root / "run.json").unlink()
    facts = report.write(root)
    assert [text.split(" (")[0].split(":")[0] for text in facts.missing] == [
        "run.json is damaged" if damage else "run.json is missing"
    ]
    made = bundle.make(root, tmp_path / "b.zip")
    assert "is missing or names no command" in unpacked(made.path, "ISSUE.md")
    assert "python -m repro watch bundle" in unpacked(made.path, "COMMANDS.sh")
    assert any("the copy cannot be judged: " in note and "run.json" in note for note in made.notes), made.notes


def test_a_run_that_the_lab_did_not_make_is_judged_in_its_bundle(tmp_path):
    """No config.json: what a watcher must know stands in run.json."""
    root, _ = write_hang(tmp_path)
    (root / "config.json").unlink()
    write_json(root / "run.json", RunDescription("server", 4, 1.0, 60.0).to_mapping())
    made = bundle.make(root, tmp_path / "b.zip")
    assert not made.notes, made.notes
    assert json.loads(unpacked(made.path, "verdict.json"))["evidence"]


def test_a_bundle_keeps_a_command_whole_or_not_at_all():
    commands = [
        {"purpose": "run it again", "words": ["python", "-m", "repro", "run", "cold_jit", "--seed", "123456789012"]},
        {"purpose": "ask alice-zorblaxx", "words": ["python", "-m", "zorblaxx"]},
        {"purpose": "run it again", "words": "python -m repro"},
        ["python"],
    ]
    document = describe(settings_of(HANG)).to_mapping() | {"commands": commands, "token": "zorblaxx"}
    recogniser = Recogniser()
    kept = documents.description(document, recogniser)
    assert kept["commands"] == commands[:1] and "zorblaxx" not in json.dumps(kept) and kept["family"] == ""
    assert recogniser.left_out["fields"] == 1 and recogniser.left_out["text"] >= 2


@pytest.mark.parametrize("source", ["zorblaxx#1", "see alice@example.org", "vllm#1; zorblaxx"])
def test_a_source_upstream_is_kept_by_its_project(source):
    document = describe(settings_of(HANG)).to_mapping()
    assert documents.description(document, Recogniser())["source"] == document["source"]
    assert documents.description(document | {"source": source}, Recogniser())["source"] == ""


def test_wrong_tokens_are_found_again_in_the_bundle_of_a_run_of_the_lab(tmp_path, capsys):
    root = finished(tmp_path, "fault")
    write_json(root / "reference.json", {"rank0-0": [1, 2]})
    for rank in range(4):
        write_json(root / "outputs" / f"rank{rank:03d}.json", {"rank0-0": [1, 3]} if rank == 0 else {})
    verdict = json.loads((root / "verdict.json").read_text())
    write_json(root / "verdict.json", verdict | {"verdict": "corrupt", "cause": None, "evidence": []})
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == EXPECTED
    assert "by the bundle's files" not in capsys.readouterr().out
    made = bundle.make(root, tmp_path / "c.zip")
    assert any("verdict is inconclusive by the bundle's files, but corrupt by" in note for note in made.notes), (
        made.notes
    )
