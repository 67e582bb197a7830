"""A bundle of foreign evidence gives the verdict of its files, and carries nothing that is not recognised."""

from __future__ import annotations

import json
import random
import zipfile
from typing import get_args

import pytest
from foreign import call, dump, py_spy, ras, watchdog, write
from fuzz_ingest import SAMPLES
from hangs import CASES
from planted import plants
from test_redaction import HOST, OWN, PEER, USER, found_in, machine  # noqa: F401

from repro import bundle
from repro.commands.cli import main
from repro.commands.shared.evidence import evidence_of
from repro.ingest.read import Evidence, read
from repro.trace.foreign.json_lines import decode, encode
from repro.trace.foreign.records import Child, Connections, LockLook, Observation, Process, ProcessLook, Source
from repro.verdict.partial import diagnose

FIELDS = ("verdict", "cause", "culprits", "suspects", "confidence")


def decided(path):
    diagnosis = diagnose(evidence_of([path]).records)
    return {name: getattr(diagnosis, name) for name in FIELDS}


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_of_a_job_s_evidence_gives_the_verdict_of_the_files(tmp_path, name):
    folder = write(tmp_path / "job", CASES[name]([2, 0, 3, 1]).files)
    made = bundle.make_of_evidence(evidence_of([folder]), tmp_path / "b.zip")
    assert decided(made.path) == decided(folder)
    assert not made.notes


def test_names_that_are_not_recognised_keep_the_verdict(tmp_path):
    """The judge compares the names of groups, functions, files and hosts, so each gets a stand-in of its own."""
    groups = {"1": ("zorblax-mesh", [0, 1, 2]), "2": ("quuxcorp", [0, 1, 2])}
    frames = [("zorblax_step", "/home/zorblax/quuxcorp/train.py", 7)]
    files = {}
    for rank in range(3):
        entries = [call(n, "all_reduce", group=(1, "1", "zorblax-mesh"), frames=frames) for n in range(1, 3)]
        op = "all_gather" if rank == 1 else "all_reduce"
        entries.append(call(3, op, group=(2, "2", "quuxcorp"), frames=frames, done=False))
        files[f"gpuqx17/trace_zorblax_rank_{rank}"] = dump(entries, groups)
    folder = write(tmp_path / "job", files)
    made = bundle.make_of_evidence(evidence_of([folder]), tmp_path / "b.zip")
    assert decided(made.path) == decided(folder)
    assert decided(folder)["verdict"] != "inconclusive"
    with zipfile.ZipFile(made.path) as archive:
        text = b"".join(archive.read(name) for name in archive.namelist()).lower()
    assert not [word for word in (b"zorblax", b"quuxcorp", b"gpuqx17") if word in text]


def evidence_with(texts):
    """A job's files with each text in every place that a reader takes a string from."""
    words = [text for text in texts if "\n" not in text]
    name = iter(words * 50)
    entries = [
        call(n, next(name), group=(1, next(name), next(name)), frames=[(next(name), f"/srv/{next(name)}/x.py", 3)])
        for n in range(1, 40)
    ]
    groups = {next(name): (next(name), [0, 1])}
    log = "".join(
        f"[rank0]: RuntimeError: {text}\n(Worker_TP1 pid=12) ERROR 07-13 10:41:52 torch.OutOfMemoryError: {text}\n"
        f"{HOST}:41:42 [0] NCCL INFO ncclCommInitRankConfig comm 0x55aa rank 0 nranks 2 cudaDev 0 nvmlDev 0 "
        "busId 5d000 commId 0x7 - Init COMPLETE\n"
        f"[4.2] {PEER} kernel: Out of memory: Killed process 41 ({text}) anon-rss:4kB\nCUDA error: {text}\n"
        f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer {text}\n"
        f"Proc {text} died unexpectedly, exit code: -9\nNET/IB : Got completion from peer {text} with error {text}\n"
        f"PEER_DEAD: Process 41 on {text}\nRank 1 is running inconsistent collective: {text}\n"
        for text in words
    )
    stacks = "".join(py_spy(text, [f"{text} (/srv/{USER}/{text}.py:3)", "main (x.py:1)"]) for text in words)
    sheet = [{"pid": 4, "thread_name": text, "frames": [{"name": text, "filename": text, "line": 3}]} for text in words]
    rows = [f"Rank 0 has launched up to operation 5 -- managed by process 4 on node {text}" for text in words]
    return {
        "trace_rank_0": dump(entries, groups), f"{USER}/trace_rank_1": dump(entries[:20], groups, as_json=False),
        "job.log": log, "stacks.txt": stacks, "stacks.json": json.dumps(sheet),
        "ras.txt": ras("MISMATCH", rows),
        f"{HOST}.log": watchdog(1, 5, "ALLREDUCE"),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["recognised", "with logs"])
def test_nothing_that_is_planted_in_a_job_s_files_is_in_their_bundle(tmp_path, machine, mode):  # noqa: F811
    if mode == "with logs":
        pytest.importorskip("detect_secrets")
    what = [*plants(random.Random(5), 60), *OWN]
    evidence = read([write(tmp_path / "job", evidence_with([each.text for each in what]))])
    assert len({type(record) for record in evidence.records}) >= 8
    made = bundle.make_of_evidence(evidence, tmp_path / "b.zip", mode == "with logs")
    found = found_in(made.path, what)
    assert not found, f"seed 5: {len(found)}: " + "\n".join(found[:20])


def test_watch_report_bundle_and_diagnose_work_on_the_folder_that_diagnose_writes(tmp_path, capsys):
    folder = write(tmp_path / "job", CASES["one_builds"]([0, 1, 2, 3]).files)
    out = tmp_path / "out"
    assert main(["diagnose", "--out", str(out), str(folder)]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "ISSUE.md",
        "records.jsonl",
        "report.html",
        "run.json",
        "verdict.json",
    ]
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    assert main(["bundle", str(out)]) == 0
    assert main(["bundle", "--verify", str(tmp_path / "out.zip")]) == 0
    capsys.readouterr()
    for arguments in (["watch", str(out)], ["diagnose", str(out)]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == printed
    for arguments in (["watch", str(tmp_path / "out.zip")], ["diagnose", str(tmp_path / "out.zip")]):
        assert main(arguments) == 0
        assert capsys.readouterr().out.splitlines()[0] == printed.splitlines()[0]


def test_a_bundle_of_several_runs_has_a_table_of_their_verdicts(tmp_path, capsys):
    runs = [
        write(tmp_path / name, CASES[case]([0, 1, 2, 3]).files)
        for name, case in [("base", "skipped"), ("zorblax", "finished")]
    ]
    assert main(["bundle", *map(str, runs), "--to", str(tmp_path / "b.zip")]) == 0
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        issue = archive.read("ISSUE.md").decode()
    assert "| `this run` | deadlock" in issue and "| `run 2` | clean" in issue and "zorblax" not in issue


def test_a_path_without_evidence_is_refused_in_one_line(tmp_path, capsys):
    assert main(["bundle", str(write(tmp_path / "job", {"x.txt": "nothing\n"}))]) == 2
    assert "neither a run directory nor evidence: x.txt:0:" in capsys.readouterr().err


def looks(text):
    """What `collect` says of a host, with a text in the place of each string."""
    process, source = Process(41, text, 1, "worker"), Source("look.jsonl", "line 3")
    return [
        ProcessLook(process, text, 0, 4.5, "S", 1.0, 0.5, 7, text, (Child(42, text, text, "R", 3.0, 2.0),), source),
        LockLook(text, "flock", text, 0, (41,), (43,), 1, 2.5, (text,), source),
        Connections(text, 0, {(41, 42): 3}, {41: 9}, (42,), source),
    ]  # fmt: skip


def test_nothing_that_is_planted_in_the_looks_of_collect_is_in_a_bundle(tmp_path, machine):  # noqa: F811
    what = [*plants(random.Random(6), 60), *OWN]
    evidence = Evidence([record for each in what for record in looks(each.text)], ["look.jsonl"])
    found = found_in(bundle.make_of_evidence(evidence, tmp_path / "b.zip").path, what)
    assert not found, f"seed 6: {len(found)}: " + "\n".join(found[:20])


def test_records_of_every_kind_are_the_same_after_they_were_saved(tmp_path):
    evidence = read([write(tmp_path, SAMPLES)])
    evidence.records += looks("x")
    assert {type(record) for record in evidence.records} == set(get_args(Observation))
    saved = b"".join(encode(evidence.records, evidence.files, evidence.not_understood))
    with (tmp_path / "saved").open("xb+") as file:
        file.write(saved)
        file.seek(0)
        records, files, refused = decode(file, "saved")
    assert b"".join(encode(records, files, refused)) == saved
    assert records[-3:] == evidence.records[-3:]


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ((b'"version":1', b'"version":9'), "1: the first line does not have the format and version"),
        ((b'["Stack"', b'["Shell"'), "not a record of a known kind"),
        ((b'"order":[0', b'"order":[9'), "$.order: the list does not have each operation"),
        ((b'"wrapped":false', b'"wrapped":NaN'), "NaN is not JSON"),
        ((b'"form":[0', b'"form":[7'), "a form number is outside the list of forms"),
        ((b'"rank":0', b'"rank":"0"'), "expected int"),
        ((b'"Note",{', b'"Note",['), ""),
    ],
)  # fmt: skip
def test_saved_records_that_were_changed_are_refused_with_the_line(tmp_path, capsys, change, refusal):
    evidence = read([write(tmp_path / "in", SAMPLES)])
    data = b"".join(encode(evidence.records, evidence.files, evidence.not_understood))
    assert change[0] in data
    folder = write(tmp_path / "out", {"records.jsonl": data.replace(*change, 1)})
    assert main(["diagnose", str(folder)]) == 2
    printed = capsys.readouterr().err
    assert "records.jsonl:" in printed and refusal in printed and len(printed.splitlines()) == 1
