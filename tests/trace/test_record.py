"""The recorder: what it promises to the rank that it watches."""

from __future__ import annotations

import _thread
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from hybrid_moe_ref.parallel.observer import Collective, Observer, ScheduleEntry
from repro.trace.recording.recorder import MAX_MESSAGE, Recorder
from repro.trace.witness.file import WitnessError, read
from repro.trace.witness.format import Geometry, Kind

REDUCE = Collective("dp", "all_reduce", "", (32,), "int32", "sum")


def recorder_at(path: Path, **more: object) -> Recorder:
    recorder = Recorder.open(path, 0, 2, run_id="run", **more)  # type: ignore[arg-type]
    recorder.groups({"dp": (0, 1), "pp": (1, 0)})
    return recorder


def test_a_recorder_is_an_observer(tmp_path: Path) -> None:
    observer: Observer = recorder_at(tmp_path / "w")
    observer.phase("serve")
    observer.begin_step(4, [ScheduleEntry("dp", "all_reduce")], 2)
    observer.enter(REDUCE)
    observer.leave(REDUCE)
    observer.local("lock_wait", "a.lock", holder=77)
    observer.failed("no more")
    observer.done()
    witness = read(tmp_path / "w")
    events = list(witness.events())
    assert [event.kind for event in events] == [
        Kind.PHASE, Kind.STEP, Kind.ENTER, Kind.LEAVE, Kind.LOCK_WAIT, Kind.FAILED, Kind.DONE,
    ]  # fmt: skip
    assert witness.schedule(events[1].sig) == (("dp", "all_reduce", ""),)
    assert (events[1].aux, events[2].step, events[4].aux) == (2, 4, 77)
    assert witness.text(events[5].sig) == "no more"
    assert witness.writer.pid == os.getpid()
    assert witness.writer.boot_id
    assert witness.writer.pid_start_ticks > 0
    assert witness.writer.pid_namespace == os.stat("/proc/self/ns/pid").st_ino


def test_an_error_of_many_lines_is_kept_as_one_of_bounded_length(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "w")
    recorder.failed("CompileError: g++\n\n  said:\n" + 500 * "more of it\n")
    witness = read(tmp_path / "w")
    text = witness.text(next(witness.events()).sig)
    assert text.startswith("CompileError: g++ said: more of it") and text.endswith(" …")
    assert "\n" not in text and len(text) == MAX_MESSAGE


def test_the_call_site_is_the_line_that_called_the_communicator(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "w")
    source = "def all_reduce(recorder, call):\n    recorder.enter(call)\n    recorder.leave(call)\n"
    namespace: dict[str, object] = {}
    exec(compile(source, "hybrid_moe_ref/parallel/comm.py", "exec"), namespace)
    line = sys._getframe().f_lineno + 1
    namespace["all_reduce"](recorder, REDUCE)  # type: ignore[operator]
    witness = read(tmp_path / "w")
    site = witness.text(next(witness.events()).site)
    assert site.startswith(f"{__file__}:{line} ")


COMMUNICATOR = """
def _enter(recorder, call):
    recorder.enter(call)

def all_reduce(recorder, call):
    _enter(recorder, call)
    recorder.leave(call)

def all_gather_text(recorder, call):
    all_reduce(recorder, call)
    _enter(recorder, call)
"""


def test_call_sites_are_told_apart_however_deep_the_communicator_is(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "w")
    comm: dict[str, Any] = {}
    exec(compile(COMMUNICATOR, "hybrid_moe_ref/parallel/comm.py", "exec"), comm)
    first = sys._getframe().f_lineno + 1
    comm["all_reduce"](recorder, REDUCE)
    comm["all_reduce"](recorder, REDUCE)
    comm["all_gather_text"](recorder, REDUCE)
    recorder.issue(REDUCE)
    witness = read(tmp_path / "w")
    lines = [
        int(witness.text(event.site).rpartition(":")[2].split()[0])
        for event in witness.events()
        if event.kind in (Kind.ENTER, Kind.ISSUE)
    ]
    assert lines == [first, first + 1, first + 2, first + 2, first + 3]


def test_a_call_site_is_found_at_any_depth_after_any_other(tmp_path: Path) -> None:
    """The recorder looks for it first where the call before had its own: elsewhere, or beyond the end of the stack."""
    recorder = recorder_at(tmp_path / "w")
    comm: dict[str, Any] = {}
    exec(compile(COMMUNICATOR, "hybrid_moe_ref/parallel/comm.py", "exec"), comm)
    finished = threading.Event()

    def directly() -> None:
        recorder.enter(REDUCE)

    def only_frame_of_its_thread() -> None:
        recorder.enter(REDUCE)
        finished.set()

    for _ in range(2):
        comm["all_gather_text"](recorder, REDUCE)
        directly()
        comm["all_reduce"](recorder, REDUCE)
        finished.clear()
        _thread.start_new_thread(only_frame_of_its_thread, ())
        assert finished.wait(60)
    witness = read(tmp_path / "w")
    sites = [witness.text(event.site).rpartition(" ")[2] for event in witness.events() if event.kind == Kind.ENTER]
    here = sys._getframe().f_code.co_qualname
    inner = [f"{here}.<locals>.{function.__name__}" for function in (directly, only_frame_of_its_thread)]
    assert sites == [here, here, inner[0], here, inner[1]] * 2


@pytest.mark.parametrize("library", ["/venv/lib/python3.11/site-packages/torch/", "/src/repro/attach/record/"])
def test_the_call_site_is_in_the_users_code_behind_any_one_library(tmp_path: Path, library: str) -> None:
    recorder = recorder_at(tmp_path / "w")
    namespace: dict[str, Any] = {}
    exec(compile("def call(recorder, call):\n    recorder.enter(call)\n", f"{library}c10d.py", "exec"), namespace)
    line = sys._getframe().f_lineno + 1
    namespace["call"](recorder, REDUCE)
    witness = read(tmp_path / "w")
    assert witness.text(next(witness.events()).site).startswith(f"{__file__}:{line} ")


def test_a_schedule_is_one_string_however_often_it_is_declared(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "w")
    first = (ScheduleEntry("dp", "all_reduce", ""), ScheduleEntry("ep", "all_gather_v", "layers.0.mlp"))
    others = [(ScheduleEntry("dp", "all_reduce", f"layers.{layer}"),) for layer in range(300)]
    for step, schedule in enumerate([first, first, list(first), *others, first, others[-1]]):
        recorder.begin_step(step, schedule, 1)
    witness = read(tmp_path / "w")
    numbers = [event.sig for event in witness.events()]
    assert len(set(numbers[:3])) == 1 and numbers[-2:] == [numbers[0], numbers[-3]]
    assert len(set(numbers)) == 1 + len(others)


def test_asynchronous_collectives_keep_their_tickets(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "w")
    first, second = recorder.issue(REDUCE), recorder.issue(REDUCE)
    assert (first, second) == (1, 2)
    recorder.wait(REDUCE, first)
    recorder.finish(REDUCE, first)
    witness = read(tmp_path / "w")
    assert [(event.kind, event.seq) for event in witness.events()] == [
        (Kind.ISSUE, 1), (Kind.ISSUE, 2), (Kind.WAIT, 1), (Kind.LEAVE, 1),
    ]  # fmt: skip
    assert (witness.groups[0].issued, witness.groups[0].left) == (2, 1)


def test_each_direction_of_point_to_point_counts_for_itself(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "w")
    for op in ("send", "recv", "send"):
        recorder.enter(Collective("pp", op, root=0))
        recorder.leave(Collective("pp", op, root=0))
    groups = {group.name: (group.members, group.issued) for group in read(tmp_path / "w").groups}
    assert groups["pp:0>1"] == ((0, 1), 2)
    assert groups["pp:1>0"] == ((1, 0), 1)


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    recorder_at(tmp_path / "w")
    with pytest.raises(WitnessError, match=f"already has a writer, process {os.getpid()}"):
        recorder_at(tmp_path / "w")


def test_a_file_of_another_rank_is_refused(tmp_path: Path) -> None:
    recorder_at(tmp_path / "w")
    (tmp_path / "w").unlink()
    from repro.trace.witness.file import create
    from repro.trace.witness.format import Identity

    create(tmp_path / "w", Identity(1, 2))
    with pytest.raises(WitnessError, match="made for rank 1 of 2, but rank 0 of 2 opens it"):
        recorder_at(tmp_path / "w")


def test_a_full_disk_is_an_error_at_open_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="No space left"):
        recorder_at(tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_heartbeats_of_another_thread_disturb_no_event(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "w", shape=Geometry(ring_records=20_000))
    began, stop = threading.Event(), threading.Event()

    def beat() -> None:
        count = 0
        while not stop.is_set():
            recorder.local("heartbeat", f"build {count % 50}")
            count += 1
            began.set()

    thread = threading.Thread(target=beat)
    thread.start()
    assert began.wait(60)
    for layer in range(3000):
        call = Collective("dp", "all_reduce", f"layer {layer % 100}", (layer,))
        recorder.enter(call)
        recorder.leave(call)
    stop.set()
    thread.join()
    witness = read(tmp_path / "w")
    assert witness.problems == ()
    assert witness.num_events == 6000
    assert witness.heartbeat.startswith("build ")
    layers = [witness.signature(event.sig).layer for event in witness.events() if event.kind == Kind.ENTER]
    assert layers == [f"layer {layer % 100}" for layer in range(3000)]


def wait_for_events(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, WitnessError):  # not made yet, or not to the end
            if read(path).num_events > count:
                return
        time.sleep(0.01)
    raise TimeoutError(f"{path}: no {count} events within 60 s")


def test_a_killed_writer_leaves_a_readable_witness(tmp_path: Path) -> None:
    for attempt in range(5):
        path = tmp_path / f"w{attempt}"
        child = os.fork()
        if child == 0:
            recorder = recorder_at(path, shape=Geometry(ring_records=64))
            while True:
                recorder.enter(REDUCE)
                recorder.leave(REDUCE)
        try:
            wait_for_events(path, 100)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        witness = read(path)
        assert witness.num_events > 100
        assert len(list(witness.events())) >= 63


def test_a_recorder_that_is_no_longer_used_closes_its_file_at_once(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path / "rank000.wit", 0, 1)
    buffer = weakref.ref(recorder._buffer)
    gc.disable()
    try:
        del recorder
        assert buffer() is None, "the recorder is part of a reference cycle"
    finally:
        gc.enable()


def test_a_list_gets_the_entries_of_the_collectives_issued_until_another_list_replaces_it(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "w")
    later = REDUCE._replace(layer="layers.1")
    one: list[ScheduleEntry] = []
    two: list[ScheduleEntry] = []
    for entries in (one, two, None):
        recorder.note_entries(entries)
        recorder.enter(REDUCE)
        recorder.leave(REDUCE)
        recorder.finish(later, recorder.issue(later))
    wanted = [ScheduleEntry(call.group, call.op, call.layer) for call in (REDUCE, later)]
    assert (one, two) == (wanted, wanted)
    assert read(tmp_path / "w").num_events == 12, "each collective is recorded as before"
