"""The bundle: complete, checkable, judged again elsewhere, free of what was to be removed, and safe to open."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from forked import run_forked
from reported import AGREE, write_hang, write_run
from scene import Scene

from repro import bundle
from repro.archive import ArchiveError, unpack
from repro.cli import main
from repro.commands import EXPECTED, UNEXPECTED, USAGE
from repro.issue import MAX_ISSUE_LINES
from repro.layout import HEADER, pack_header
from repro.parse import parse_header
from repro.redact import Redactor, redact_witness
from repro.settings import RunSettings
from repro.witness import parse, read

ROOT = Path(__file__).resolve().parent.parent
SECRET, HOME, HOST, ADDRESS = "hunter2-swordfish", "/home/alice-example", "gpu-node-17.example.org", "10.20.30.40"
PEER = "gpu-node-18.example.org"
FORMS = [
    f"{HOME}/secret_project/train.py on {HOST} ({ADDRESS}) argv --auth-token {SECRET} HF_TOKEN=hf_abcdefgh",
    "MASTER_ADDR=10.20.30.40 --rdzv-endpoint=10.20.30.40:29400, listening on 10.20.30.41. [2001:db8::5]:80",
    f"cc -I{HOME}/secret_project/inc -L{HOME}/secret_project/lib file://{HOME}/secret_project/x.py",
    "-I/data/secret_project/i -I/home/bob-example/x/y file:///home/bob-example/x.py",
    "/home/bob-example '/data/secret_project/a b/c d.py'",
    f"home {HOME} and {HOME}/ and {HOME}: ~bob-example/x",
    "api_token=planted01 hf_token: planted02 password=planted03,planted04 https://h/x?a=1&token=planted05&b=2",
    "Authorization: Bearer planted06 authorization=Basic planted07 'password': 'planted08 planted09'",
    "--api-key planted10 --api-key=planted11 ['--api-key', 'planted12'] --key planted13 apiKey=planted14",
    "sent Bearer planted15 with hf_planted16planted16planted16, ghp_planted17planted17planted17",
    f"gpu-node-17-ib0 gpu-node-17_0 GPU-NODE-17 mlx5@gpu-node-17/0 {PEER} gpu-node-18x ALICE-EXAMPLE_1 {SECRET}2",
]
WORDS = " ".join(FORMS)
PLANTED = [
    SECRET, "alice-example", "bob-example", "gpu-node-1", "10.20.30.4", "2001:db8", "example.org", "secret_project",
    "hf_abcdefgh", "planted", "a b/c",
]  # fmt: skip


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A run whose files hold secrets, home paths, host names and addresses, everywhere and in every form they have."""
    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    monkeypatch.setenv("MY_OTHER_TOKEN", f"{SECRET}2")
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setenv("USER", "alice-example")
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    monkeypatch.setattr("socket.getfqdn", lambda: HOST)
    root, scene = write_hang(tmp_path / "runs")
    for number, words in enumerate(FORMS):
        recorder = scene.recorders[number % 4]
        recorder.local("build_begin", words)
        recorder.local("build_end", words)
    for rank, data in enumerate(scene.files):
        path = root / "events" / f"rank{rank:03d}.wit"
        path.write_bytes(bytes(data))
        who, shape = parse_header(path.read_bytes(), "")
        header = pack_header(replace(who, hostname=PEER if rank == 3 else HOST), shape)
        path.write_bytes(header + path.read_bytes()[len(header) :])
    for name in ("rank000.log", "launcher.log", "reference.log"):
        (root / "logs" / name).write_text("\n".join(FORMS))
    (root / "logs" / "gpu-node-17.log").write_text("named like a host")
    (root / "stacks" / "rank001.txt").write_text(f'Current thread 0x1:\n  File "{HOME}/secret_project/a.py", line 3\n')
    (root / "env").mkdir(exist_ok=True)
    (root / "env" / "rank000.txt").write_text(f"NCCL_SOCKET_IFNAME=eth0 {WORDS}\n")
    more = {"DB_PASSWORD": "abc123", "hf_token": ["planted20"], "HF_TOKENS": {"x": ["planted21"]}, "password": 90210}
    argv = ["--api-key", "planted22", "--seed", "3", "--tokenizer", "Qwen/Q"]
    told = {"entries": [], "where": WORDS, "argv": argv, "api-key": "planted23", "max_tokens": "kept", **more}
    (root / "fr" / "rank000.json").write_text(json.dumps(told))
    verdict = json.loads((root / "verdict.json").read_text())
    verdict["evidence"] += FORMS
    verdict["ranks"][0]["detail"] = WORDS
    (root / "verdict.json").write_text(json.dumps(verdict))
    monkeypatch.setattr(bundle, "_environment", lambda redactor: redactor.text(WORDS))
    return root


@pytest.fixture
def quick(monkeypatch):
    """Without torch's collect_env, which takes seconds and has a test of its own."""
    monkeypatch.setattr(bundle, "_environment", lambda redactor: "not asked\n")


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_bundle_holds_everything_and_verifies(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == EXPECTED
    told = capsys.readouterr().out
    assert "removed 0: values of variables" in told and "--keep-hostnames" in told
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
        ("slow", None, "the verdict is slow; only a deadlock follows from who issues what in which order"),
        ("crash", "dead_rank", "the verdict is crash"),
        ("clean", None, "the verdict is clean"),
        ("inconclusive", None, "the verdict is inconclusive"),
        ("", None, "there is no verdict"),
        ("deadlock", "sizes", "whether that hangs is a race in the backend"),
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
    told = files["ISSUE.md"].decode().splitlines()[-1]
    assert "control/" not in told and ("verdict.json" in told) == bool(verdict)


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
    assert ("--fix" in source) == ("cured" in source) == (b"--fix" in files["ISSUE.md"]) == offered
    assert ("fix/" in files["ISSUE.md"].decode().splitlines()[-1]) == (fix != "none")
    assert any(note.startswith("repro.py is without --fix: fix: 3 witnesses") for note in made.notes) == (fix == "torn")
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


def test_what_was_planted_is_nowhere_in_it(planted, tmp_path):
    made = bundle.make(planted, tmp_path / "b.zip")
    files = contents(made.path)
    for name, data in files.items():
        for text in [*PLANTED, "abc123", "90210"]:
            assert text.encode() not in data.lower() and text not in name, f"{text} in {name}"
    assert all(made.removed[rule] for rule in ("secrets", "hostnames", "addresses", "paths")), made.removed
    for name in ("rank000.log", "launcher.log", "reference.log"):
        log = files[f"logs/{name}"].decode()
        assert "host-1" in log and "host-2" in log
        assert "train.py" in log, "a file's own name stays"
    dump = json.loads(files["fr/rank000.json"])
    assert dump["argv"] == ["--api-key", "<secret>", "--seed", "3", "--tokenizer", "Qwen/Q"]
    assert dump["max_tokens"] == "kept" and "gpu-node-17.log is left out: not a file" in " ".join(made.notes)


@pytest.mark.parametrize(
    ("rule", "kept"), [("hostnames", HOST), ("secrets", SECRET), ("addresses", ADDRESS), ("paths", "secret_project")]
)
def test_a_single_rule_can_be_undone(planted, tmp_path, rule, kept):
    made = bundle.make(planted, tmp_path / "b.zip", frozenset({rule}))
    data = b"".join(contents(made.path).values())
    assert kept.encode() in data
    others = {"hostnames": HOST, "secrets": SECRET, "addresses": ADDRESS}
    assert not any(text.encode() in data for other, text in others.items() if other != rule)


def test_something_that_slipped_through_stops_the_bundle(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "redact_witness", lambda data, name, redactor: data)
    assert main(["bundle", str(planted), "--to", str(tmp_path / "b.zip")]) == 125
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "b.zip").exists()


def test_a_redacted_witness_says_the_same(tmp_path):
    root, _ = write_hang(tmp_path)
    path = root / "events" / "rank000.wit"
    redactor = Redactor()
    again = parse(redact_witness(path.read_bytes(), str(path), redactor), str(path))
    before = read(path)
    assert again.who.hostname == "host-1" and before.who.hostname == "host0"
    assert again.problems == before.problems == ()
    assert again.ring == before.ring and again.groups == before.groups and again.vectors == before.vectors
    assert len(again.strings) == len(before.strings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_prompt_tokens: 12, linear_num_key_heads=2, 70 tokens", None),
        ("--tokens 1,2,3 --api-key abc", "--tokens 1,2,3 --api-key <secret>"),
        ("AWS_SECRET_ACCESS_KEY='abc/def'", "AWS_SECRET_ACCESS_KEY='<secret>'"),
        ("at 127.0.0.1:80, ::1, 12:34:56, nvidia-cudnn==9.10.2.21", None),
        ("from 192.168.1.7:80 and fe80::1 and 00:1a:2b:3c:4d:5e", "from <address>:80 and <address> and <mac>"),
        ('File "/data/x/y/model.py", line 3', 'File "<path>/model.py", line 3'),
        ("~/work/notes.txt", "<path>/notes.txt"),
        ("/opt/venv/lib/python3.11/site-packages/torch/nn/a.py:3", "site-packages/torch/nn/a.py:3"),
        ("ep all_gather_v/reduce_scatter_v of layers.0", None),
        ("see https://example.org/a/b", None),
        ("--tokenizer Qwen/Q --max-tokens few, tokens: many, KeyError: 'x', sorted(key=len)", None),
        ("HF_TOKEN=\nNCCL_DEBUG=INFO --use-token --port 80", None),
        ("torch==2.13.0 10.20.30.40.50, 1.2.3.4567", None),
        ("MASTER_ADDR=10.20.30.40 on 10.20.30.41.", "MASTER_ADDR=<address> on <address>."),
        ("-I/home/bob/inc /home/bob", "-I<path>/inc <home>"),
        ("-I/data/venv/lib/site-packages/torch/include", "-Isite-packages/torch/include"),
        ("f(password=a,b)", "f(password=<secret>)"),
    ],
)
def test_what_is_redacted_and_what_is_not(text, expected):
    assert Redactor().text(text) == (text if expected is None else expected)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("repro", "python -m repro run; repro@h; USER=repro; /x/repro", "python -m repro run; {}@h; USER={}; /x/repro"),
        ("runner", "runner.py host=runner", "runner.py host={}"),
        ("ribut", "contribute for ribut_2", "contribute for {}_2"),
        ("zorblaxx", "aZorblaxxb", "a{}b"),
        ("bob", "bob-laptop bobbin", "{}-laptop bobbin"),
    ],
)
def test_a_name_that_is_a_word_of_this_program_is_replaced_only_where_it_stands_as_a_name(name, text, expected):
    for redactor, stand_in in (
        (Redactor(literals={"users": {name}}), "<user>"),
        (Redactor(hosts={name: "host-1"}), "host-1"),
    ):
        redactor.keep = frozenset({"paths"})
        assert redactor.text(text) == expected.replace("{}", stand_in)


def test_a_secret_that_is_a_word_in_another_case_stops_no_bundle(tmp_path, quick, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "Zorblaxx")
    root, _ = write_hang(tmp_path)
    (root / "logs" / "rank000.log").write_text("zorblaxx Zorblaxx")
    made = bundle.make(root, tmp_path / "b.zip")
    assert contents(made.path)["logs/rank000.log"].decode() == "zorblaxx <secret>"


def test_a_host_of_two_letters_is_looked_for_in_text_and_not_in_numbers(tmp_path, quick, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "zq")
    monkeypatch.setattr("socket.getfqdn", lambda: "zq")
    root, _ = write_hang(tmp_path)
    (root / "logs" / "rank000.log").write_text("on zq: zq-ib0 zqx")
    path = root / "events" / "rank000.wit"
    data = bytearray(path.read_bytes())
    data[HEADER.size + 100 : HEADER.size + 104] = b" zq "  # a number that happens to look so
    path.write_bytes(data)
    made = bundle.make(root, tmp_path / "b.zip")
    assert contents(made.path)["logs/rank000.log"].decode() == "on host-1: host-1-ib0 zqx"


def test_no_text_takes_a_rule_more_than_linear_time():
    redactor = Redactor(literals={"users": {"zorblaxx"}})
    for piece in ("a", "A", "KEY", "a.", "token=,", "/a", "'/a/", "1.", "a:", "eyJ-", "--key ", "?key"):
        began = time.process_time()
        redactor.text(piece * (60_000 // len(piece)))
        assert time.process_time() - began < 2, piece


def test_two_hosts_stay_two():
    redactor = Redactor()
    for name in ("alpha.example.org", "beta.example.org"):
        redactor.name_host(name)
    assert redactor.text("alpha waits for beta.example.org") == "host-1 waits for host-2"


def test_the_issue_is_short_and_marks_up_nothing_of_a_strangers(tmp_path, quick):
    root, _ = write_hang(tmp_path, layer="<img src=x>`|[a](b)" + "y" * 500)
    text = contents(bundle.make(root, tmp_path / "b.zip").path)["ISSUE.md"].decode()
    assert len(text.splitlines()) <= MAX_ISSUE_LINES and len(text) < 10_000
    assert "<img" not in text and "\\[a" in text and "`|" not in text
    assert "deadlock" in text and "Culprits: ranks 0-2" in text and "python -m repro run metadata_rebuild" in text


def test_the_bundle_of_a_damaged_run_says_what_was_left_out(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    (root / "events" / "rank001.wit").write_bytes(b"x" * 100)
    (root / "fr" / "rank001.json").write_text("{")
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == EXPECTED
    told = capsys.readouterr().out
    assert "events/rank001.wit is left out" in told and "rank001.json is not JSON" in told


@pytest.mark.timeout(20)
def test_what_is_no_file_is_left_out_with_a_note_and_not_waited_for(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    pipes = ["events/rank002.wit", "fr/rank002.json", "stacks/rank002.txt", "logs/rank002.log", "logs/launcher.log"]
    for name in pipes:  # nobody writes to them: whoever waited for one would wait for ever
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)
    (root / "logs" / "rank003.log").unlink()
    (root / "logs" / "rank003.log").symlink_to("/etc/passwd")
    (root / "env" / "rank003.txt").mkdir()
    assert main(["report", str(root)]) == EXPECTED
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == EXPECTED
    told = capsys.readouterr().out
    for name in (*pipes, "env/rank003.txt"):
        assert f"{name} is left out: {name}:0: not a regular file" in told
    assert "logs/rank003.log is left out: a link" in told
    assert not contents(tmp_path / "b.zip").keys() & {*pipes, "logs/rank003.log", "env/rank003.txt"}


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_bundle_is_refused_in_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "b.zip")
    for command in (["bundle", "--verify"], ["watch"], ["bundle"]):
        assert main([*command, str(tmp_path / "b.zip")]) == USAGE
        told = capsys.readouterr().err
        assert "b.zip" in told and told.count("\n") == 1, told
    assert main(["bundle", "--verify", str(tmp_path)]) == USAGE
    assert capsys.readouterr().err == f"repro: {tmp_path}:0: not a regular file\n"


def entry(
    names: str | list[str], data: bytes = b"x", mode: int = 0o100644, *, method: int = zipfile.ZIP_DEFLATED,
    claims: int = 0,
) -> bytes:  # fmt: skip
    """A zip of entries with these names; claims: the size that its directory says they have."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in [names] if isinstance(names, str) else names:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name
            info.external_attr = mode << 16
            archive.writestr(info, data, method)
            info.file_size = claims or info.file_size
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (entry("/etc/passwd"), "/etc/passwd is an absolute"),
        (entry("C:/x"), "C:/x is an absolute"),
        (entry("events/../../x"), "events/../../x leads out"),
        (entry("events/rank000.wit", b"/etc/passwd", 0o120777), "events/rank000.wit is not a regular file but a link"),
        (entry("deep/er/and/deeper"), "deep/er/and/deeper is not a file of a bundle"),
        (entry("events/rank\x1b[2J.wit"), "events/rank␛[2J.wit is not a file of a bundle"),
        (entry("events/rank000.wit", bytes(129 << 20)), "events/rank000.wit unpacks to"),
        (entry("../evil/"), "../evil is not a regular file"),
        (entry("../evil/", b"", 0o40755), "../evil leads out"),
        (entry("deep/er/and/deeper/", b"", 0o40755), "deep/er/and/deeper is not a file of a bundle"),
        (entry("events", b"x"), "no MANIFEST.json"),
        (entry(["events", "events/rank000.wit"]), "events is in it as a file and as a folder"),
        (entry([f"logs/a{n}" for n in range(9)], claims=127 << 20), "up to logs/a8 it unpacks to"),
        (entry("config.json", b"x" * 99, method=zipfile.ZIP_BZIP2), "config.json is compressed as no bundle is"),
        (b"PK\x03\x04 no zip", "not a zip"),
        (entry("config.json"), "no MANIFEST.json"),
    ],
    ids=str.split(
        "absolute drive slip link foreign escape bomb folder-as-file folder-slip foreign-folder file-for-folder"
        " file-and-folder many-bombs bzip2 torn no-manifest"
    ),
)
def test_a_zip_that_is_not_safe_is_refused_by_name(tmp_path, capsys, data, words):
    path = tmp_path / "bad.zip"
    path.write_bytes(data)
    for command in (["watch", str(path)], ["bundle", "--verify", str(path)]):
        assert main(command) == USAGE
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1, told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.zip"]


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path):
    data = bytearray(entry("events/rank000.wit", bytes(1 << 20)))
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = (100).to_bytes(4, "little")  # the uncompressed size in the directory
    (tmp_path / "liar.zip").write_bytes(data)
    (tmp_path / "into").mkdir()
    with pytest.raises(ArchiveError):
        unpack(tmp_path / "liar.zip", tmp_path / "into")


def test_a_bundle_with_a_flipped_bit_is_refused_in_one_line(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    whole = bundle.make(root, tmp_path / "b.zip").path.read_bytes()
    refused = 0
    for at in range(40, len(whole), len(whole) // 20):
        path = tmp_path / "flipped.zip"
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        code = main(["bundle", "--verify", str(path)])
        told = capsys.readouterr()
        assert code in (EXPECTED, UNEXPECTED, USAGE), told
        assert "Traceback" not in told.err and told.err.count("\n") == (code == USAGE), told
        refused += code != EXPECTED
    assert refused > 10


def test_names_in_a_manifest_and_a_witness_do_nothing_to_a_terminal(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path, layer="layer\x1b[2J\x9b31m")
    for command in (["watch", str(root)], ["report", str(root)]):
        main(command)
        told = "".join(capsys.readouterr())
        assert "layer␛[2J<U+009B>31m" in told and "\x1b" not in told and "\x9b" not in told
    files = contents(bundle.make(root, tmp_path / "b.zip").path)
    manifest = json.loads(files["MANIFEST.json"])
    manifest["files"]["\x1b[2Jgone"] = {"sha256": ""}
    files["MANIFEST.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    for command in (["bundle", "--verify"], ["watch"]):
        main([*command, str(tmp_path / "changed.zip")])
        told = "".join(capsys.readouterr())
        assert "␛[2Jgone is missing" in told and "\x1b" not in told


def test_a_changed_file_is_named(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    made = bundle.make(root, tmp_path / "b.zip")
    files = contents(made.path)
    files["verdict.json"] = files["verdict.json"].replace(b"extra", b"order")
    del files["fr/rank000.json"]
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        for name, data in {**files, "logs/added.log": b"x"}.items():
            archive.writestr(name, data)
    assert main(["bundle", "--verify", str(tmp_path / "changed.zip")]) == UNEXPECTED
    told = capsys.readouterr().out.splitlines()
    assert told == ["fr/rank000.json is missing", "logs/added.log is not in the manifest", "verdict.json was changed"]
    assert main(["watch", str(tmp_path / "changed.zip")]) == USAGE
    assert "fr/rank000.json is missing, and 2 more" in capsys.readouterr().err


def test_a_bundle_that_nobody_could_open_is_not_made(tmp_path, quick, monkeypatch, capsys):
    root, _ = write_hang(tmp_path)
    monkeypatch.setattr(bundle, "MAX_TOTAL_BYTES", 1000)
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == USAGE
    assert "would unpack to" in capsys.readouterr().err and not (tmp_path / "b.zip").exists()


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
    assert {f"{folder}/{name}" for folder in ("control", "fix") for name in bundle._FILES} <= files.keys()
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
        assert all(documents["fault"][key] == told[key] for told in (judged, *verdicts)), key
