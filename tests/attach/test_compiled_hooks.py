"""The compiled hooks write what the hooks in Python write, and a rank without them is recorded all the same."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.attach.record import compiled
from repro.attach.record.compiled import recorder as compiled_recorder
from repro.attach.record.rank import Rank
from repro.commands.record import SITE
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import parse, read_dir
from repro.trace.witness.format import Geometry, Identity, Kind, pack_header

JOB = Path(__file__).resolve().parents[1] / "support" / "jobs" / "many_calls.py"


@pytest.fixture(scope="module")
def library() -> None:
    if problem := compiled.build():
        pytest.skip(problem)


def recorders(kinds: list[type[Recorder]]) -> list[Recorder]:
    """Recorders that write into memory, each with a clock that counts how often it was asked."""
    made = []
    for kind in kinds:
        times = iter(range(1000, 10**9, 7))
        shape = Geometry(ring_records=64, vector_words=32, string_bytes=1 << 16, group_slots=4)
        buffer = bytearray(shape.file_bytes)
        made.append(kind(buffer, Identity(1, 4, "run"), shape, clock=times.__next__))
    return made


def test_both_recorders_write_the_same_bytes(library, monkeypatch):
    monkeypatch.setattr(compiled_recorder, "_library", compiled.load.__wrapped__())
    for seed in range(20):
        chance = random.Random(seed)
        pair = recorders([Recorder, compiled_recorder.CompiledRecorder])
        groups = [f"group{i}" for i in range(6)]  # more than have a slot
        calls = [
            Collective(chance.choice(groups), op, layer, sizes, "float32", reduction, root)
            for op, sizes, reduction, root in [
                ("all_reduce", (8,), "sum", -1), ("barrier", (), "", -1), ("broadcast", (3,), "", 2),
                ("all_gather_v", (1, 2, 3), "", -1), ("all_gather_v", (3, 2, 1, 9), "", -1), ("send", (), "", 2),
            ]
            for layer in ("", "layers.0")
        ]  # fmt: skip
        notes: list[list[ScheduleEntry]] = [[], []]
        issued: list[tuple[int, list]] = []
        for step in range(200):
            choice, call = chance.random(), chance.choice(calls)
            if choice < 0.1:
                for recorder in pair:
                    recorder.phase(f"phase {step % 3}")
            elif choice < 0.2:
                for recorder in pair:
                    recorder.begin_step(step, (ScheduleEntry(*call[:3]),), 3)
            elif choice < 0.3:
                for recorder in pair:
                    recorder.local("lock_wait", "a.lock", 77)
            elif choice < 0.35:
                for recorder, entries in zip(pair, notes, strict=True):
                    recorder.note_entries(entries if step % 2 else None)
            elif choice < 0.8 or not issued:
                for recorder in pair:
                    recorder.enter(call, step % 2 == 0)
                issued.append((pair[0].last_seq, [recorder.last_call for recorder in pair]))
                if step % 5 == 0:
                    for recorder in pair:
                        recorder.leave(call)
            else:
                ticket, known = issued.pop(chance.randrange(len(issued)))
                for recorder, one in zip(pair, known, strict=True):
                    recorder.wait(None, ticket, one)
                    recorder.leave(None, ticket, one)
        for recorder in pair:
            recorder.done()
        assert bytes(pair[0]._buffer) == bytes(pair[1]._buffer), f"seed {seed}"
        assert notes[0] == notes[1] and notes[0], f"seed {seed}"


def events_of(programs, folder: Path, cache: Path | str, **variables: str) -> list[tuple]:
    """Run the job; return what its witness says, without times."""
    env = {
        **os.environ,
        "HMR_RECORD": str(folder),
        "PYTHONPATH": str(SITE),
        "XDG_CACHE_HOME": str(cache),
        **variables,
        "HMR_RECORD_MODULES": "1",
    }
    done = programs.run(JOB, env=env)
    assert (done.returncode, "not recorded" in done.stderr) == (0, False), done.stdout + done.stderr
    (witness,), refused = (list(part) for part in (read_dir(folder / "events")[0].values(), read_dir(folder)[1]))
    assert not refused
    found = [
        (
            Kind(e.kind).name,
            e.seq,
            witness.text(e.sig),
            witness.text(e.site),
            witness.sizes(e.vector, e.num_sizes),
            e.aux,
            e.hash,
        )
        for e in witness.events()
    ]
    return [*found, done.stdout]  # which prints the types of the hooks


def test_both_hooks_record_the_same_of_a_program(library, programs, tmp_path):
    cache = compiled.path().parents[2]
    fast = events_of(programs, tmp_path / "fast", cache)
    slow = events_of(programs, tmp_path / "slow", cache, HMR_RECORD_PURE="1")
    assert len(slow) > 100
    assert [pair for pair in zip(fast[:-1], slow[:-1], strict=True) if pair[0] != pair[1]] == []
    assert (fast[-1], slow[-1]) == ("Issue Issue Issue Wait\n", "function function function function\n")


def test_a_rank_without_a_library_is_recorded_in_python(programs, tmp_path):
    assert len(events_of(programs, tmp_path / "run", tmp_path / "no_cache")) > 100


def test_a_signal_handler_may_cause_an_event_while_one_is_written(tmp_path):
    times = iter(range(1000))

    def clock() -> int:
        if (now := next(times)) == 1:
            rank.local_event("lock_freed", "inner")
        return now

    shape = Geometry(ring_records=8, vector_words=2, string_bytes=1 << 10, group_slots=2)
    buffer = bytearray(shape.file_bytes)
    header = pack_header(Identity(0, 1), shape)
    buffer[: len(header)] = header
    rank = Rank(Recorder(buffer, Identity(0, 1), shape, clock=clock), 0, tmp_path)
    names = ("first", "outer", "last")
    thread = threading.Thread(target=lambda: [rank.local_event("lock_held", name) for name in names], daemon=True)
    thread.start()
    thread.join(timeout=60)
    witness = parse(bytes(buffer), "memory")
    assert sorted(witness.text(e.sig) for e in witness.events()) == ["first", "inner", "last", "outer"]
    assert witness.problems == ()


def test_what_prevents_the_build_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled.build() == "there is no C compiler: install one, or set CC"
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert compiled.build().endswith("cc failed: no space left")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "NotADirectoryError" in compiled.build()
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("version", ["", "3.12", "3.13", "3.14"])
def test_the_hooks_run_in_each_version_of_python(version):
    python = shutil.which(f"python{version}") if version else sys.executable
    can_build = "from repro.attach.record import compiled; print(compiled.build())"
    env = {**os.environ, "PYTHONPATH": str(JOB.parents[3])}
    built = python and subprocess.run([python, "-c", can_build], env=env, capture_output=True, text=True)
    if not built or built.returncode or "install" in built.stdout:
        pytest.skip(f"no Python {version} with its headers")
    done = subprocess.run([python, str(JOB.with_name("hooks_alone.py"))], env=env, capture_output=True, text=True)
    assert done.stdout == "recorded\n", done.stderr


@pytest.mark.parametrize("variables", [{}, {"HMR_RECORD_PURE": "1"}], ids=["compiled", "python"])
def test_a_program_with_own_classes_runs_as_if_it_were_not_recorded(library, programs, tmp_path, variables):
    env = {**os.environ, "HMR_RECORD": str(tmp_path), "PYTHONPATH": str(SITE), **variables}
    done = programs.run(JOB.with_name("own_classes.py"), env=env)
    assert done.stdout.split() == ["FakeWork", "FakeWork", "KeyboardInterrupt", "FakeWork", "TypeError"], done.stderr


def test_a_known_call_runs_no_python_code_of_the_recorder(library, programs, tmp_path):
    program = """
import sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
ran, x = [], torch.ones(3)
for _ in range(3):
    ran.clear()
    sys.setprofile(lambda frame, event, _: ran.append(frame.f_code.co_filename) if event == "call" else None)
    dist.all_reduce(x)
    sys.setprofile(None)
print(*[name for name in ran if "repro" in name], len(ran) > 0)
"""
    env = {**os.environ, "HMR_RECORD": str(tmp_path), "PYTHONPATH": str(SITE)}
    done = programs.run(program, env=env)
    assert done.stdout == "True\n", done.stdout + done.stderr
