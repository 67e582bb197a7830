"""The compiled hooks around functions of Python, without torch, so that each version of Python can run them.

Sets and arrays stand for groups and works, because the hooks leave objects of a program's classes alone.
"""

from __future__ import annotations

import sys
from array import array
from types import SimpleNamespace

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.attach.record import compiled
from repro.attach.record.compiled.recorder import CompiledRecorder
from repro.trace.witness.file import parse
from repro.trace.witness.format import Geometry, Identity, Kind, pack_header

NUM_WORKS = 200

shape = Geometry(ring_records=4096, vector_words=2, string_bytes=1 << 12, group_slots=2)
header = pack_header(Identity(0, 2), shape)
library = compiled.load()


def new_recorder() -> tuple[CompiledRecorder, bytearray]:
    buffer = bytearray(shape.file_bytes)
    buffer[: len(header)] = header
    return CompiledRecorder(buffer, Identity(0, 2), shape), buffer


recorder, buffer = new_recorder()
library.record(True, recorder.tape)

resolved, reads = [], []


def resolve(group: object, *args: object) -> tuple:
    resolved.append(args)
    call, depth = recorder.call_at(sys._getframe(1), Collective("world", "all_reduce", "", (8,), "float32", "sum"))
    return call, depth, False


def slow(*_: object) -> None:
    raise AssertionError("the compiled hook does not know this call")


def getter(options: SimpleNamespace) -> bool:
    reads.append(options)
    return vars(options)["asyncOp"]


issue = library.Issue(lambda *_: array("b"), slow, resolve, 1, True, False, False, False)
wait = library.Wait(lambda work: True, slow)
option = library.Option(property(getter, lambda o, value: vars(o).update(asyncOp=value)), "asyncOp", ())
group, tensor = set(), SimpleNamespace(dtype="float32", numel=lambda: 8)


def program(asynchronous: bool) -> list[array]:
    works = []
    for _ in range(NUM_WORKS):
        options = SimpleNamespace()
        option.__set__(options, asynchronous)
        works.append(issue(group, [tensor], options))
        if not asynchronous:
            wait(works[-1])
    return works


for work in program(True):
    wait(work)
program(False)
program(True)  # nobody waits for these
library.spill()
assert len(library.pending) <= NUM_WORKS and all(entry[0]() is None for entry in library.pending.values())
kinds = [Kind(event.kind) for event in parse(bytes(buffer), "memory").events()]
assert kinds[:NUM_WORKS] == [Kind.ISSUE] * NUM_WORKS
assert kinds[NUM_WORKS : 5 * NUM_WORKS] == [Kind.WAIT, Kind.LEAVE] * NUM_WORKS + [Kind.ENTER, Kind.LEAVE] * NUM_WORKS
assert kinds[5 * NUM_WORKS :] == [Kind.ISSUE] * NUM_WORKS
assert (len(resolved), reads) == (2, []), (len(resolved), len(reads))

library.record(False, None)
library.record(True, recorder.tape)  # the same rank again: its calls are still known
program(True)
assert len(resolved) == 2, len(resolved)
recorder, buffer = new_recorder()
library.record(True, recorder.tape)  # another rank: the calls belong to the first one's file
program(True)
assert len(resolved) == 3, len(resolved)
assert len(list(parse(bytes(buffer), "memory").events())) == NUM_WORKS
references = sys.getrefcount(group)
assert references == 2, references

rows = SimpleNamespace(is_cpu=True, tolist=lambda: [[5, 7], [8, 8], [1, 0], [2, 2]])
learn, declare, noted = [], [], []
agreement = ScheduleEntry("dp", "all_reduce", "step")
plan = (ScheduleEntry("dp", "barrier", ""),)
progress = recorder.tape.progress = library.Progress()
progress.phase, progress.agreement, progress.live, progress.executing = "serve", (agreement,), 3, True
progress.plans["serve", 0, 2] = plan, [agreement, *plan]


def agree_slowly() -> SimpleNamespace:
    learn.append(progress.step)
    recorder.note_entries(noted)
    progress.expected = [agreement, *plan]
    return rows


agree = library.Agreement(lambda: rows, agree_slowly, declare.append, "step")
agree()
for _ in range(NUM_WORKS):
    noted[:] = [agreement, *plan]
    progress.begun = False
    assert agree() is rows
assert (learn, declare, progress.step, noted) == ([-1], [], NUM_WORKS - 1, []), (learn, declare, progress.step)
steps = [event for event in parse(bytes(buffer), "memory").events() if event.kind == Kind.STEP]
assert [(event.step, event.aux) for event in steps] == [(step, 3) for step in range(NUM_WORKS) for _ in range(2)]
print("recorded")
