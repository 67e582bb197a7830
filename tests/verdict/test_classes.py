"""The register of verdict classes: every output follows from a row, and the documentation lists the rows."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from msgspec import structs
from reported import write_hang
from rich.console import Console
from simulated_watch import World, make_run_dir
from simulator import Simulation

from repro import report
from repro.commands.cli import main
from repro.commands.shared.verdicts import exit_code
from repro.exit_codes import CANNOT_TELL, EXPECTED, UNEXPECTED
from repro.hosts.options import WatchOptions
from repro.lab import scenarios
from repro.report.gather import gather, headline
from repro.report.junit import write_junit
from repro.report.terminal import overview, summary
from repro.store.run_dir import write_json
from repro.store.schema import to_json
from repro.verdict import Verdict
from repro.verdict.classes import CLASSES, END, INTERRUPT, VerdictClass
from repro.watch.document import read_document
from repro.watch.qualified import ended_from_outside, not_decided

ROOT = Path(__file__).resolve().parents[2]


def test_the_documentation_and_the_help_list_each_class_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    listed = (ROOT / "docs" / "VERDICTS.md").read_text()
    with pytest.raises(SystemExit):
        main(["watch", "--help"])
    shown = capsys.readouterr().out
    for name, each in CLASSES.items():
        assert f"| [{name}](#{name}) | {each.meaning} |" in listed
        assert f"{name} " in shown and each.meaning in shown
    fields = (ROOT / "docs" / "DIAGNOSE.md").read_text()
    assert f"| `verdict` | {', '.join(CLASSES)} |" in fields


@pytest.mark.parametrize("name", [*scenarios.names(), "config1", "config2", "tp8"])
def test_each_verdict_that_a_scenario_predicts_has_a_class_with_its_cause(name: str) -> None:
    for variant in ("control", "fault", "fix"):
        settings = scenarios.settings_of({"scenario": name, "variant": variant})
        expected = scenarios.load(name).expected(settings)
        while expected is not None:
            assert expected.cause is None or expected.cause in CLASSES[expected.verdict].causes, expected
            expected = expected.or_else  # type: ignore[assignment]


@pytest.fixture
def livelock(monkeypatch: pytest.MonkeyPatch) -> VerdictClass:
    """A class that no rule has yet, with a cause of its own."""
    added = VerdictClass("livelock", "ranks retry for ever", "red", hangs=True, causes={"retry": "a retry without end"})
    monkeypatch.setitem(CLASSES, "livelock", added)
    return added


def test_each_output_shows_a_class_that_is_added_to_the_table(
    livelock: VerdictClass, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = write_hang(tmp_path)
    document = structs.replace(read_document(root / "verdict.json"), verdict="livelock", cause="retry")
    write_json(root / "verdict.json", to_json(document))
    facts = report.write(root)
    page = (root / "report.html").read_text()
    assert '<body class="red">' in page and "livelock: retry" in page
    assert headline(facts.verdict).startswith("Livelock: a retry without end by ranks 0-2;") and facts.stuck
    assert gather(root).verdict == document and json.loads((root / "trace.json").read_text())
    missed = structs.replace(document, matches_expected=False)
    summary(Console(width=200), [document])
    overview(Console(width=200), [document, structs.replace(missed, scenario="another")])
    shown = capsys.readouterr().out
    assert shown.count("livelock") == 3 and "1.20 s" in shown
    write_junit(tmp_path / "junit.xml", [missed])
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("1", "0")
    assert exit_code([document]) == EXPECTED and exit_code([missed]) == UNEXPECTED
    undecided = structs.replace(missed, verdict="inconclusive")
    assert exit_code([undecided]) == CANNOT_TELL and exit_code([undecided, missed]) == UNEXPECTED


@pytest.mark.parametrize("final", [True, False])
def test_a_watch_ends_with_a_verdict_of_a_final_class_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, final: bool
) -> None:
    added = VerdictClass("livelock", "ranks retry for ever", "red", hangs=True, final=final)
    monkeypatch.setitem(CLASSES, "livelock", added)
    monkeypatch.setattr("repro.watch.look.judge", lambda *args, **options: Verdict("livelock", quiet_s=1.0))
    run_dir = make_run_dir(tmp_path)
    world = World(
        Simulation([[("sleep", 10**12)]] * 2, {"dp": [(0, 1)]}, folder=run_dir.root),
        run_dir,
        WatchOptions(2, 1.0, 5.0),
        1,
    )
    document = world.watch().run()
    at_the_deadline = any("deadline" in line for line in document.evidence)
    assert document.verdict == "livelock" and at_the_deadline == (not final), document.evidence


@pytest.mark.parametrize("outside", [(), (END,), (INTERRUPT,), (INTERRUPT, END)])
def test_an_act_from_outside_weakens_the_classes_that_it_explains(
    monkeypatch: pytest.MonkeyPatch, outside: tuple[str, ...]
) -> None:
    added = VerdictClass("livelock", "ranks retry for ever", "red", hangs=True, outside=outside)
    monkeypatch.setitem(CLASSES, "livelock", added)
    check_weakened("livelock", interrupted=INTERRUPT in outside, ended=END in outside)


@pytest.mark.parametrize("name", CLASSES)
def test_an_interrupt_explains_slowness_and_an_ended_launcher_deaths_too(name: str) -> None:
    check_weakened(name, interrupted=name == "slow", ended=name in ("slow", "crash"))


def check_weakened(name: str, *, interrupted: bool, ended: bool) -> None:
    verdict = Verdict(name, culprits=(1,))
    why = "the launcher received SIGTERM"
    for after, is_weakened in ((not_decided(verdict), interrupted), (ended_from_outside(verdict, why), ended)):
        expected = ("inconclusive", ()) if is_weakened else (name, (1,))
        assert (after.verdict, after.culprits) == expected


def test_of_the_classes_only_a_wrong_end_fails_a_test_whose_ranks_have_finished() -> None:
    assert [name for name, each in CLASSES.items() if each.is_finished_wrong] == ["corrupt"]
    assert [name for name, each in CLASSES.items() if each.live] == ["slow"]
