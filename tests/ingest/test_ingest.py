"""Readers of foreign formats: each wording and version to the same records, and nothing that a stranger's file can
break.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile

import fuzz_ingest
import pytest
from foreign import call, dump, watchdog, write

from repro.commands.cli import main
from repro.ingest.logs import log as logs
from repro.ingest.read import read
from repro.ingest.recorder import flight_recorder
from repro.trace.foreign.records import Failure, Progress, RecorderDump, TimedOut


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


@pytest.mark.parametrize("seed", [0, 50, 700])
def test_damaged_and_hostile_files_are_refused_with_a_place_and_the_good_ones_used(seed):
    assert fuzz_ingest.fuzz(50, seed) == []


@pytest.mark.full
def test_five_thousand_damaged_and_hostile_inputs_do_no_harm():
    assert fuzz_ingest.fuzz(5000, 1000) == []


def test_links_pipes_and_devices_are_listed_and_not_read(tmp_path):
    write(tmp_path / "in", {"good.log": "[rank0]: KeyError: 'x'\n"})
    (tmp_path / "in" / "link").symlink_to("/etc/passwd")
    (tmp_path / "in" / "device").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "in" / "pipe")
    evidence = read([tmp_path / "in"])
    assert evidence.files == ["good.log"]
    assert [line.partition(" ")[0] for line in evidence.not_understood] == ["device:0:", "link:0:", "pipe:0:"]


def test_an_entry_without_a_name_in_a_zip_is_listed_and_the_others_are_read(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "job.zip", "w") as archive:
        archive.writestr("x", b"1")
        archive.writestr("good.log", b"[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n")
    data = (tmp_path / "job.zip").read_bytes()
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"PK\x01\x02"))  # the first entry of the directory
    nameless = data[: at + 28] + b"\0\0" + data[at + 30 : at + 46] + data[at + 47 :]
    end = nameless.rindex(b"PK\x05\x06")
    size = int.from_bytes(nameless[end + 12 : end + 16], "little") - 1
    (tmp_path / "job.zip").write_bytes(nameless[: end + 12] + size.to_bytes(4, "little") + nameless[end + 16 :])
    evidence = read([tmp_path / "job.zip"])
    assert evidence.files == ["job.zip/good.log"]
    assert evidence.not_understood == ["job.zip:0: an entry without a name"]
    assert main(["bundle", "--verify", str(tmp_path / "job.zip")]) == 2
    assert "an entry without a name" in capsys.readouterr().err


def test_a_zip_that_unpacks_to_too_much_is_left_and_its_good_file_used(tmp_path, monkeypatch):
    monkeypatch.setattr("repro.ingest.read.MAX_STRUCTURED_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(2 << 20))
        archive.writestr("good.log", "[rank0]: KeyError: 'x'\n")
    evidence = read([tmp_path / "bomb.zip"])
    assert evidence.files == ["bomb.zip/good.log"]
    assert evidence.not_understood == [
        "bomb.zip/zeros:0: the file is larger than 1 MiB: unpack the zip and give the folder"
    ]


def test_a_list_that_holds_itself_many_times_over_is_no_work(tmp_path):
    rows = ["x"]
    for _ in range(60):
        rows = [rows, rows]
    entry = call(1, "all_reduce") | {
        "process_group": (rows, rows),
        "input_sizes": rows,
        "profiling_name": rows,
        "pg_id": rows,
    }
    recorded = flight_recorder.read(
        pickle.dumps({"entries": [entry], "pg_config": {"1": {"desc": rows}}}, protocol=2), "r_0"
    )
    assert len(recorded.groups[0].calls) == 1


@pytest.mark.full
def test_a_log_of_200_megabytes_is_streamed():
    line = b"(EngineCore_DP0 pid=7) INFO 10-22 09:43:49 [core.py:466] step done, 41 tokens\n"

    class Generated(io.RawIOBase):
        left = (200 << 20) // len(line)

        def readable(self):
            return True

        def readinto(self, buffer):
            count = min(len(buffer) // len(line), self.left)
            self.left -= count
            buffer[: count * len(line)] = line * count
            return count * len(line)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(logs.read(io.BufferedReader(Generated(), 1 << 20), "vllm.log"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert [note.kind for note in found] == ["process"] and grown < 64 << 10


def test_diagnose_needs_no_torch(tmp_path):
    write(tmp_path, {"a.log": "[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n"})
    program = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; from repro.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run([sys.executable, "-c", program, "diagnose", tmp_path], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and "out of memory" in ended.stdout
