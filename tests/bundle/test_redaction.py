"""What is planted in a run is nowhere in a bundle of it, whatever it is and wherever it was planted."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import urllib.parse
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from planted import Plant, plants
from reported import write_hang

from repro import bundle
from repro.bundle import assemble
from repro.store.run_dir import write_json
from repro.trace.witness.format import pack_header
from repro.trace.witness.parse import parse_header

MODES = ["recognised", "with logs"]
USER, HOME, HOST, PEER = "qalicezz", "/srv/qalicezz", "gpuqx17.corp.example", "gpuqx18.corp.example"
ENVIRONMENT = {
    "DB_PASS": "zq090Xk9Lm2Vb7Rt4",
    "DATABASE_URL": "postgres://svc:zq092Xk9Lm2Vb7Rt4@db/x",
    "COOKIE": "zq094Xk9Lm2Vb7Rt4",
    "MY_API_TOKEN": "abc/def+ghi=zq096Xk9Lm2Vb7Rt4",
    "TWO_LINES_TOKEN": "zq098Xk9Lm2Vb7Rt4\nzq099Xk9Lm2Vb7Rt4",
    "LETTERS_TOKEN": "swordfishes",
}
OWN = [
    Plant("own user", f"/srv/{USER}/x.py {USER.upper()}", (USER,)),
    Plant("own user alone", f"{USER} began", (USER,)),
    Plant("own host", "on gpuqx17 and GPUQX17-ib0, then gpuqx18", ("gpuqx17", "gpuqx18")),
    *(Plant(name, f"value {value} seen", tuple(value.splitlines())) for name, value in ENVIRONMENT.items()),
    Plant("a line of two", "x zq099Xk9Lm2Vb7Rt4 y", ("zq099Xk9Lm2Vb7Rt4",)),
    Plant("in base64", base64.b64encode(b"abc/def+ghi=zq096Xk9Lm2Vb7Rt4").decode(), ("YWJjL2RlZitnaGk9",)),
    Plant("in a url", urllib.parse.quote("abc/def+ghi=zq096Xk9Lm2Vb7Rt4", safe=""), ("abc%2Fdef",)),
]  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """A machine whose user, host and environment are made up."""
    for name, value in (ENVIRONMENT | {"USER": USER, "HOME": HOME}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    monkeypatch.setattr("socket.getfqdn", lambda: HOST)


def plant(out: Path, what: list[Plant], monkeypatch) -> Path:
    """A run with each plant in every kind of file, and as every kind of string."""
    root, scene = write_hang(out)
    texts = [each.text for each in what]
    for number, text in enumerate(texts):  # a witness has room for a quarter
        recorder = scene.recorders[number % 4]
        recorder.local("build_begin", text)
        recorder.local("build_end", text)
        if "\n" not in text and number < 24:
            recorder.local("lock_held", f"/locks/{text}.lock")
            recorder.local("heartbeat", text)
    for rank, data in enumerate(scene.files):
        writer, shape = parse_header(bytes(data), "")
        header = pack_header(replace(writer, hostname=PEER if rank == 3 else HOST, run_id=texts[0][:60]), shape)
        (root / "events" / f"rank{rank:03d}.wit").write_bytes(header + bytes(data[len(header) :]))
    words = "\n".join(texts)
    raised = "\n".join(f"RuntimeError: {text}" for text in texts)
    frames = "\n".join(f'  File "/srv/{USER}/{text}.py", line 3, in {text}' for text in texts if "\n" not in text)
    for name in ("rank000.log", "launcher.log", "reference.log"):
        (root / "logs" / name).write_text(f"{words}\n{raised}\n{frames}\n{words}")
    (root / "stacks" / "rank001.txt").write_text(f"Current thread 0x1 (most recent call first):\n{frames}\n{words}\n")
    for name in ("env/rank000.txt", "outputs/rank000.json", "reference.json", "logs/notes.txt"):
        (root / name).parent.mkdir(exist_ok=True)
    variables = "\n".join(f"NCCL_DEBUG={text}" for text in texts)
    (root / "env" / "rank000.txt").write_text(f"{words}\n{variables}\nmodule {texts[1]}: 1.0\nGPU: {texts[2]}\n")
    (root / "logs" / "notes.txt").write_text(words)
    write_json(root / "reference.json", {text: [1, 2] for text in texts})
    write_json(root / "outputs" / "rank000.json", {text: [1, 2] for text in texts})
    argv = [word for text in texts for word in text.split()]
    entry = {"profiling_name": words, "frames": [{"name": text, "filename": text} for text in texts], "argv": argv}
    write_json(
        root / "fr" / "rank000.json", {"entries": [entry], "argv": argv, **dict.fromkeys(texts, 1), "version": words}
    )
    verdict = json.loads((root / "verdict.json").read_text())
    verdict["evidence"] += texts
    verdict["sentences"] += texts
    verdict["notes"] += texts
    verdict["ranks"][0] |= {"detail": words, "layer": texts[3], "site": f"{texts[4]}:3 {texts[5]}", "phase": texts[6]}
    verdict["watcher"] = {"hostname": HOST, "boot_id": "boot0", "argv": argv}
    verdict["system"]["excused"] = {"0": texts[7]}
    verdict |= dict.fromkeys(texts, "x")
    write_json(root / "verdict.json", verdict)
    config = json.loads((root / "config.json").read_text())
    config["engine"]["cache_dir"] = f"/srv/{USER}/cache"
    write_json(root / "config.json", config)
    report = f"{words}\nOS: {texts[0]}\nModel name: {texts[1]}\nGPU models and configuration: {texts[2]}\n"
    answer = subprocess.CompletedProcess([], 0, report, "")
    monkeypatch.setattr(assemble.subprocess, "run", lambda *args, **options: answer)
    return root


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert not archive.comment and not any(entry.comment or entry.extra for entry in archive.infolist())
        return {name: archive.read(name) for name in archive.namelist()}


def found_in(path: Path, what: list[Plant]) -> list[str]:
    files = {name: name.lower().encode() + b"\n" + data.lower() for name, data in contents(path).items()}
    return [
        f"{each.kind}: {text} of {each.text!r} in {name}"
        for each in what
        for text in each.nowhere
        for name, data in files.items()
        if text.lower().encode() in data
    ]


def bundled(tmp_path: Path, seed: int, count: int, mode: str, monkeypatch) -> list[str]:
    if mode == "with logs":
        pytest.importorskip("detect_secrets")
    rng = random.Random(seed)
    what = [*plants(rng, count), *OWN]
    root = plant(tmp_path / "runs", what, monkeypatch)
    log = (root / "logs" / "rank000.log").read_text()
    assert all(each.text in log for each in what)
    made = bundle.make(root, tmp_path / "b.zip", mode == "with logs")
    return found_in(made.path, what)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_is_planted_is_in_a_bundle(tmp_path, machine, monkeypatch, mode):
    found = bundled(tmp_path, 1, 300, mode, monkeypatch)
    assert not found, f"seed 1: {len(found)}: " + "\n".join(found[:40])


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(2, 12))
def test_nothing_of_thousands_of_plants_is_in_a_bundle(tmp_path, machine, monkeypatch, mode, seed):
    found = bundled(tmp_path, seed, 400, mode, monkeypatch)
    assert not found, f"seed {seed}: {len(found)}: " + "\n".join(found[:40])
