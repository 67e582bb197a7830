"""Readers of foreign formats: each wording and version to the same records, and nothing that a stranger's file can
break.
"""

from __future__ import annotations

import io
import random
import subprocess
import sys
import zipfile

import pytest
from foreign import call, dump, py_spy, ras, watchdog, write

from repro.ingest.read import _records, read
from repro.trace.observed import Failure, Progress, RecorderDump, Stack, TimedOut


def records(text, name="rank_3.log"):
    return _records(io.BytesIO(text.encode()), name)


def test_files_folders_and_zips_are_read_in_any_mixture_and_the_rest_is_listed(tmp_path):
    write(tmp_path / "folder", {"rank_0.log": watchdog(0, 3, "ALLREDUCE"), "noise.bin": b"\0\0", "expect.json": "{}"})
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("trace_rank_1", dump([call(1, "all_reduce")], {"1": ("ep", [0, 1])}))
    evidence = read([tmp_path / "folder", tmp_path / "more.zip"])
    assert {type(record) for record in evidence.records} == {TimedOut, Progress, RecorderDump}
    assert evidence.files == ["rank_0.log", "more.zip/trace_rank_1"] and [
        line.split(":")[0] for line in evidence.not_understood
    ] == ["noise.bin"]


def test_a_line_that_a_cut_file_ends_in_is_not_read(tmp_path):
    evidence = read([write(tmp_path, {"a.log": "[rank0]: RuntimeError: [/x/gloo/tr"})])
    assert evidence.records == []


def test_a_last_line_of_a_log_that_ends_there_is_read_with_its_end(tmp_path):
    evidence = read([write(tmp_path, {"a.log": "KeyError: 'x'\n"})])
    assert [type(record) for record in evidence.records] == [Failure]


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_to_a_file_ends_a_reader(seed):
    rng = random.Random(seed)
    samples = [
        (
            "trace_rank_0",
            dump([call(n, "all_reduce", frames=[("f", "x.py", 1)]) for n in range(5)], {"1": ("ep", [0, 1])}),
        ),
        ("rank_0.json", dump([call(1, "all_reduce")], {"1": ("ep", [0, 1])}, as_json=True)),
        ("rank_1.log", watchdog(1, 5, "ALLREDUCE").encode()),
        ("s.txt", py_spy("VLLM::Worker_TP0", ["acquire (filelock/_api.py:344)"]).encode()),
        ("ras.txt", ras("MISMATCH", ["Rank 0 has launched up to operation 5 -- x"]).encode()),
    ]
    for number in range(400):
        name, data = rng.choice(samples)
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 3, 20))):
            place = rng.randrange(len(damaged) + 1)
            damaged[place : place + rng.choice((0, 1, 5))] = rng.randbytes(rng.choice((0, 1, 4)))
        try:
            found = _records(io.BytesIO(bytes(damaged)), name)
        except ValueError:
            continue
        assert all(isinstance(record, Stack) or record for record in found), f"seed {seed}, input {number}"


def test_diagnose_needs_no_torch(tmp_path):
    write(tmp_path, {"a.log": "[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n"})
    program = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; from repro.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run([sys.executable, "-c", program, "diagnose", tmp_path], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and "out of memory" in ended.stdout
