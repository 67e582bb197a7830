"""The report: whole in one file, true to the evidence, inert against its strings, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from reported import AGREE, write_hang, write_run
from scene import Scene

from repro import report
from repro.commands.cli import main
from repro.exit_codes import EXPECTED, USAGE
from repro.ingest.read import Evidence
from repro.report.diagnosis.page import page as diagnosis_page
from repro.report.gather import gather, headline
from repro.report.page.rank_files import main_stack
from repro.report.page.sides import side_by_side
from repro.report.pictures.waits import draw_waits
from repro.store.text import escape_control_characters, shorten_rank_lists
from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.result import Wait

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a browser would make of the document: its elements, and the text that a person reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data + " "


def page_of(root: Path) -> Page:
    report.write(root)
    return Page((root / "report.html").read_text())


def test_the_page_tells_verdict_positions_and_the_way_back(tmp_path):
    root, _ = write_hang(tmp_path)
    page = page_of(root)
    text = " ".join(page.text.split())
    assert "Deadlock: a collective too many by ranks 0-2" in text
    assert "anks 0-2 in dp all_reduce #4 wait for 3" in text, text
    assert "ank 3 in ep all_gather_v #5 waits for 0-2" in text, text
    assert "python -m repro run metadata_rebuild --variant fault --ranks 4" in text
    assert "Missing or damaged" not in text
    assert [tag for tag, _ in page.elements].count("main") == 1


def test_the_page_needs_nothing_from_outside(tmp_path):
    root, _ = write_hang(tmp_path)
    page = page_of(root)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "img"), tag
        for name in ("src", "href"):
            link = attributes.get(name) or ""
            assert not re.match(r"(https?:)?//", link), (tag, link)
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "sha256-" in policy


def test_the_schedules_are_set_side_by_side_where_they_part(tmp_path):
    root, _ = write_hang(tmp_path)
    found = side_by_side(gather(root))
    assert found is not None and found.heads == ("ranks 0-2 issued", "rank 3 issued") and found.step == 2
    lines = [(row.planned, row.issued, row.diverges) for row in found.rows]
    assert lines == [
        ("dp all_reduce · step", ("dp all_reduce · step",) * 2, (False, False)),
        ("", ("dp all_reduce · layers.0.gated_delta_net", ""), (True, False)),
        ("ep all_gather_v · layers.0.moe", ("", "ep all_gather_v · layers.0.moe"), (False, False)),
        ("ep reduce_scatter_v · layers.0.moe", ("", ""), (False, False)),
    ]


def test_the_control_run_stands_beside_the_fault(tmp_path):
    scene = Scene(4, {"dp": (0, 1, 2, 3), "ep": (0, 1, 2, 3)})
    scene.begin_step(0, [], (0,))
    scene.all_of((0, 1, 2, 3), AGREE)
    for recorder in scene.recorders:
        recorder.done()
    control = write_run(tmp_path, scene, "control")
    root, _ = write_hang(tmp_path)
    page = page_of(root)
    links = [a["href"] for t, a in page.elements if t == "a"]
    assert f"../{control.name}/report.html" in links
    assert "control clean" in " ".join(page.text.split())


HUGE = "9" * 400
HEAD = '"title": "a", "num_ranks": 4, "quiet_window_s": 1'
HOSTILE = "\uffff\ufffe\u2066</script><img src=x onerror=alert(1)>\x1b[31m\"'&{{facts}}" + "x" * 3000


def test_hostile_strings_are_shown_and_do_nothing(tmp_path):
    root, _ = write_hang(tmp_path, layer=f"a{HOSTILE}", op=f"b{HOSTILE[:200]}")
    (root / "logs" / "rank000.log").write_text(f"log {HOSTILE}\x1b]0;title\x07\n<svg onload=alert(2)>")
    verdict = json.loads((root / "verdict.json").read_text())
    verdict["scenario"] = f"scenario {HOSTILE}"
    verdict["ranks"][0]["detail"] = verdict["evidence"][0] = f"event {HOSTILE}"
    verdict["waits"][0] |= {"waits_in": f"place {HOSTILE}", "why": f"why {HOSTILE}"}
    (root / "verdict.json").write_text(json.dumps(verdict))
    page = page_of(root)
    scripts = [a for t, a in page.elements if t == "script"]
    assert len(scripts) == 2 + 4, "the data, the program and a lane a rank"
    assert all(tag != "img" and not any(name.startswith("on") for name in a) for tag, a in page.elements)
    for name in report.FILES:
        assert "\x1b" not in (root / name).read_text(), name
    assert "<img src=x onerror=alert(1)>␛[31m" in page.text
    ElementTree.fromstring((root / "timeline.svg").read_text())
    json.loads((root / "trace.json").read_text())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("verdict.json", None, "verdict.json is missing"),
        ("verdict.json", "{", "verdict.json is damaged"),
        (
            "verdict.json",
            "[]",
            "(verdict.json:1: $: expected object, got array): no verdict",
        ),
        ("verdict.json", "{}", "$: object missing required field verdict"),
        (
            "verdict.json",
            '{"verdict": "slow", "waits": [{"ranks": ["a"]}]}',
            "$.waits[0].ranks[0]: expected int",
        ),
        ("verdict.json", f'{{"quiet_s": {HUGE}, "seconds": {{"total": {HUGE}}}}}', "$.quiet_s: number out of range"),
        ("verdict.json", '{"seed": 1e999}', "1e999 is beyond the range of a float"),
        (
            "verdict.json",
            f'{{"ranks": [{{"rank": 0, "since_s": {HUGE}, "sizes": [{HUGE}]}}]}}',
            "$.ranks[0].since_s: number",
        ),
        ("run.json", None, "run.json is missing: the report cannot show what the run rebuilds"),
        ("run.json", "[]", "run.json is damaged (run.json:1: wanted a mapping"),
        ("run.json", '{"title": 5}', "run.json is damaged (run.json:1: num_ranks: required, but missing)"),
        ("run.json", f'{{{HEAD}, "deadline_s": {HUGE}}}', "deadline_s: int 99999"),
        ("run.json", f'{{{HEAD}, "deadline_s": 1, "schema_version": 9}}', "schema_version: 9 is not a version"),
        (
            "run.json",
            f'{{{HEAD}, "deadline_s": 1, "commands": [{{"purpose": "", "words": [1]}}]}}',
            "words[0]: wanted str",
        ),
        ("config.json", "{", "config.json is damaged"),
        ("events/rank001.wit", None, "rank 1 left no readable witness"),
        ("events/rank001.wit", "x" * 100, "the file ends inside its header"),
        ("stacks/rank002.txt", None, "stacks: rank 2 left no file"),
        ("fr/rank003.json", None, "fr: rank 3 left no file"),
        ("logs/rank003.log", None, "logs: rank 3 left no file"),
        ("stacks/rank002.txt", "\0\1\2", "stacks/rank002.txt:1: the file contains no stack"),
        ("stacks/rank002.txt", 'Thread 0x1:\n  File "a.py", li', "stacks/rank002.txt:2: the last stack is incomplete"),
        ("fr/rank001.json", "{", "fr/rank001.json:1: Expecting property name"),
        ("fr/rank001.json", '{"entries": 5}', "fr/rank001.json:1: the file is not a dump of the Flight Recorder"),
        ("reference.json", '{"a": [1, 2', "reference.json:1: Expecting"),
        ("reference.json", '{"a": [1, "2"]}', "reference.json:1: the content does not map requests to lists of tokens"),
        ("outputs/rank001.json", "[]", "outputs/rank001.json:1: the content does not map requests to lists of tokens"),
    ],
)
def test_a_page_of_a_damaged_run_says_what_is_missing(tmp_path, name, content, words):
    root, _ = write_hang(tmp_path)
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    page = page_of(root)
    assert words in page.text, page.text[:2000]


def test_the_headline_cuts_a_long_error(tmp_path):
    facts = gather(write_hang(tmp_path)[0])
    sentence = "rank 0 failed: RuntimeError: " + "very " * 200
    assert len(headline(msgspec.structs.replace(facts.verdict, sentences=(sentence, "rank 3 died")))) < 300


def test_a_box_shows_the_end_of_a_long_lock_name(tmp_path):
    facts = gather(write_hang(tmp_path)[0])
    lock = "lock /var/tmp/somebody/cache/kernels/gdn_prefill-773b/lock"
    wait = Wait(ranks=(0, 1), waits_in=lock, awaited=(3,))
    facts.verdict = msgspec.structs.replace(facts.verdict, waits=(wait,))
    assert "lock …" in draw_waits(facts) and "/gdn_prefill-773b/lock<" in draw_waits(facts)


def test_the_page_of_a_diagnosis_shows_hostile_strings_and_they_do_nothing():
    names = ("summary", "evidence", "refutes", "notes", "collect")
    diagnosis = Diagnosis("deadlock", "extra", (0,), **{name: (f"{name} {HOSTILE}",) for name in names})
    text = diagnosis_page(diagnosis, Evidence([], files=[HOSTILE], not_understood=[HOSTILE]), JobRecords())
    page = Page(text)
    assert "\x1b" not in text and "\u2066" not in text, "no control character"
    assert not [tag for tag, _ in page.elements if tag in ("img", "script")]
    assert page.text.count("<img src=x onerror=alert(1)>␛[31m") == len(names) + 2


def test_a_torn_witness_still_gives_its_lane(tmp_path):
    root, _ = write_hang(tmp_path)
    path = root / "events" / "rank001.wit"
    path.write_bytes(path.read_bytes()[:9000])
    page = page_of(root)
    assert "rank001.wit:9000: damage: the file ends early" in page.text
    assert any(a.get("id") == "lane1" for _, a in page.elements)


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == USAGE
    assert "not a run directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == USAGE
    assert "no such folder" in capsys.readouterr().err


def test_the_command_lists_its_files(tmp_path, capsys):
    root, _ = write_hang(tmp_path)
    assert main(["report", str(root), "--json"]) == EXPECTED
    (answer,) = json.loads(capsys.readouterr().out)
    assert [Path(path).name for path in answer["files"]] == ["report.html", "timeline.svg", "trace.json"]
    assert all(Path(path).is_file() for path in answer["files"]) and answer["missing"] == []


def test_the_main_thread_is_the_last_of_a_dump_wherever_the_signal_landed():
    text = 'Current thread 0x1 (most recent call first):\n  File "a.py", line 1 in dump\n\n'
    text += 'Thread 0x2 (most recent call first):\n  File "/x/site-packages/torch/b.py", line 2 in wait\n'
    assert main_stack(text) == '  File "torch/b.py", line 2 in wait'


def test_many_ranks_are_counted_not_listed():
    long = ",".join(str(rank) for rank in range(0, 40, 2))
    assert shorten_rank_lists(f"ranks {long} wait") == "ranks 0,2,4,… (20) wait"
    assert shorten_rank_lists("ranks 1-5,7 wait") == "ranks 1-5,7 wait"
    huge = ",".join(["9" * 5000] * 12)
    assert shorten_rank_lists(huge) == huge, "no list of ranks"


def test_nothing_acts_in_visible_text():
    assert escape_control_characters("a\x1b[2J\u202eb\x7f\x9b") == "a␛[2J<U+202E>b␡<U+009B>"
    assert len(escape_control_characters("x" * 10_000)) == 400


def test_the_headline_of_no_verdict_says_so(tmp_path):
    root, _ = write_hang(tmp_path)
    (root / "verdict.json").unlink()
    assert headline(gather(root).verdict) == "This run has no verdict."


def test_the_report_never_imports_torch():
    code = "import sys, repro.commands.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- in a browser ----------------------------------------------------------------------------------------------------


def browse(path: Path, profile: Path, width: int) -> subprocess.CompletedProcess[str]:
    """The document after its script has run, and what the console said."""
    command = [
        CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={profile}", f"--window-size={width},900", "--virtual-time-budget=4000", "--dump-dom",
        path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("layer", ["layers.0.moe", HOSTILE])
def test_a_browser_draws_the_page_without_a_word_on_its_console(tmp_path, width, layer):
    root, _ = write_hang(tmp_path, layer=layer)
    report.write(root)
    seen = browse(root / "report.html", tmp_path / "profile", width)
    assert "CONSOLE" not in seen.stderr, seen.stderr[-3000:]
    assert re.search(r'<html[^>]* data-drawn="\d+"', seen.stdout), seen.stdout[:500]
    assert 'class="red interactive"' in seen.stdout
