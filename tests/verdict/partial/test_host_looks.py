"""What two looks at the processes of a job prove, and what they do not."""

from __future__ import annotations

import dataclasses

import pytest

from repro.trace.foreign.records import Child, Connections, LockLook, Note, Process, ProcessLook, Source, Stack
from repro.verdict.partial import diagnose
from repro.verdict.partial.words import program_frames

PLACES = {
    "all_reduce": ("collective", "all_reduce"),
    "barrier": ("collective", "barrier"),
    "recv": ("collective", "recv"),
    "wait": ("collective", "a wait for a queued operation"),
    "send": ("collective", "send"),
    "backward": ("backward", "a backward pass"),
    "device": ("device", "torch.cuda.synchronize"),
    "lock": ("lock", "a file lock (FileBaton)"),
    "idle": ("idle", "a message: the worker waits"),
    "queue": ("queue", "a ZeroMQ socket"),
    "runs": ("", ""),
    "save": ("saving", "a checkpoint"),
    "prompt": ("debugger", "a debugger prompt"),
}


def rank(
    number,
    place="all_reduce",
    *,
    moves=False,
    cpu_s=0.0,
    state="S",
    line=10,
    stack=True,
    children=(),
    switches=80,
    **more,
):
    """Two looks at a rank, two seconds apart, and its stacks. moves: its first thread leaves a processor meanwhile."""
    process = Process(100 + number, "", number, "worker")
    records = []
    for look in (1, 2):
        passed = look - 1
        records.append(ProcessLook(
            process, "host", look, 2.0 * look, state if not isinstance(state, tuple) else state[passed], cpu_s * passed,
            cpu_s * passed, 50 + switches * passed * moves, "", tuple(children), Source("facts/host.json"),
        ))  # fmt: skip
        if stack:
            activity, detail = PLACES[place]
            at = line if isinstance(line, int) else line[passed]
            frames = ("inner (torch/x.so)", f"step (train.py:{at})")
            records.append(Stack(process, frames, activity, detail, "MainThread", 0,
                                 Source(f"stacks/rank_{number}.look{look}.json"), **more))  # fmt: skip
    return records


def spins(number, places=10):
    """A rank that is at a line of a collective in five looks, and uses a processor; or at several lines."""
    records = rank(number, cpu_s=1.9, moves=True)
    stack = records[-1]
    lines = [places] * 3 if isinstance(places, int) else places
    for sample, line in zip("bcd", lines, strict=True):
        frames = (stack.frames[0], f"step (train.py:{line})")
        source = Source(f"stacks/rank_{number}.look1{sample}.json")
        records.append(dataclasses.replace(stack, frames=frames, source=source))
    return records


def serves(number, *places):
    """A worker that moves, and is seen in each of these places once."""
    records = [record for record in rank(number, moves=True, cpu_s=1.2) if isinstance(record, ProcessLook)]
    (stack, *_) = [record for record in rank(number) if isinstance(record, Stack)]
    for look, place in zip(("1", "1b", "1c", "1d", "2"), places, strict=False):
        activity, detail = PLACES[place]
        source = Source(f"stacks/rank_{number}.look{look}.json")
        records.append(dataclasses.replace(stack, activity=activity, detail=detail, source=source))
    return records


def job(*ranks, world=None, extra=()):
    size = len(ranks) if world is None else world
    return [*(record for rows in ranks for record in rows), Note("world", "", Process(), str(size)), *extra]


def meshed(count, ranks=3, **unequal):
    pairs = {(100 + a, 100 + b): count for a in range(ranks) for b in range(a + 1, ranks)}
    pairs |= unequal.get("but", {})
    return Connections("host", 1, pairs)


def lock(holders, waiters, look, **more):
    return LockLook("/cache/lock", more.pop("kind", "baton"), "host", look, tuple(holders), tuple(waiters), **more)


def verdict(records):
    diagnosis = diagnose(records)
    return diagnosis.verdict, diagnosis.cause, diagnosis.culprits, diagnosis.suspects


NOBODY = ("inconclusive", "", ())
RUNS = {"moves": True, "cpu_s": 1.8}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (job(rank(0), rank(1, "runs", **RUNS), rank(2)), ("slow", "straggler", (1,), ())),
        (job(rank(0), rank(1, "save", **RUNS), rank(2, "backward")), ("slow", "straggler", (1,), ())),
        (job(rank(0), rank(1, "prompt"), rank(2)), ("stall", "host", (1,), ())),
        (job(rank(0), rank(1, "runs", state="T"), rank(2)), ("stall", "host", (1,), ())),
        (job(rank(0, cpu_s=1.9), rank(1, "runs", state="T")), ("stall", "host", (1,), ())),
        (job(rank(0), rank(1, "runs", state=("S", "R")), rank(2)), ("stall", "host", (1,), ())),
        (job(rank(0), rank(1, "runs", state=("S", "R"), line=(3, 9)), rank(2)), ("slow", "straggler", (1,), ())),
        (job(rank(0), rank(1, "runs", state=("S", "X"), stack=False), rank(2)), ("crash", "dead_rank", (1,), ())),
        (job(rank(0), rank(2), world=3, extra=[Note("no process", "", Process(rank=1), "1")]),
         ("crash", "dead_rank", (1,), ())),
        (job(rank(0), rank(1, "barrier"), rank(2), extra=[meshed(1)]), ("deadlock", "mismatch", (), (1,))),
        (job(rank(0, "backward"), rank(1, "barrier")), ("deadlock", "mismatch", (), ())),
        (job(rank(0, group="default"), rank(1, "barrier", group="default"), rank(2, group="default")),
         ("deadlock", "mismatch", (), (1,))),
        (job(rank(0, group="a in f", other_groups=("b in f",)), rank(1, group="b in f")),
         ("deadlock", "order", (), ())),
        (job(rank(0, "recv", peer=1), rank(1, "recv", peer=2), rank(2, "recv", peer=0)),
         ("deadlock", "order", (), (0, 1, 2))),
        (job(rank(0, "device", cpu_s=1.9), rank(1, "runs", **RUNS)), ("slow", "straggler", (1,), ())),
        (job(rank(0, "lock", moves=True), rank(1, "runs", children=[Child(7, "cicc", "cicc a.cu", "R", 9.0, 3.0)])),
         ("slow", "", (1,), ())),
        (job(*(rank(number, moves=True, cpu_s=0.4) for number in range(3))), ("clean", "", (), ())),
        (job(rank(0, moves=True), rank(1, "runs", **RUNS), rank(2, moves=True)), ("clean", "", (), ())),
        (job(serves(0, "idle", "all_reduce"), serves(1, "all_reduce", "idle")), ("clean", "", (), ())),
        (job(serves(0, "idle", "queue", "runs"), serves(1, "all_reduce", "runs")), ("clean", "", (), ())),
        (job(spins(0), rank(1, "runs", **RUNS)), ("slow", "straggler", (1,), ())),
        (job(spins(0, [10, 10, 12]), rank(1, "runs", **RUNS)), ("clean", "", (), ())),
    ],
)  # fmt: skip
def test_the_rank_that_the_others_wait_for_is_named(records, expected):
    assert verdict(records) == expected, diagnose(records)


@pytest.mark.parametrize(
    ("why", "records"),
    [
        ("one rank of the job is not seen", job(rank(0), rank(1, "runs", **RUNS), world=3)),
        ("another rank waits for its engine", job(rank(0), rank(1, "runs", **RUNS), rank(2, "idle"))),
        ("the ranks in the collective poll",
         job(rank(0, moves=True, switches=15), rank(1, "runs", **RUNS), rank(2, moves=True, switches=15))),
        ("the place of a rank changed", job(rank(0, line=(3, 9)), rank(1, "runs", **RUNS))),
        ("two ranks are in different calls of groups that are not known", job(rank(0), rank(1, "barrier"), rank(2))),
        ("some ranks share more groups than others",
         job(rank(0), rank(1, "barrier"), rank(2), extra=[meshed(1, but={(100, 101): 2})])),
        ("calls of one kind at two lines may be the same call", job(rank(0, line=3), rank(1, line=9))),
        ("the variables of two groups are of two programs",
         job(rank(0, group="a in f"), rank(1, group="b in g"))),
        ("the other end is in the matching transfer",
         job(rank(0, "recv", peer=1), rank(1, "send", peer=0), rank(2, "recv", peer=0))),
        ("one waits for orders in every look", job(serves(0, "idle", "idle", "idle"), serves(1, "all_reduce", "runs"))),
        ("one waits for a lock in one of them", job(serves(0, "lock", "idle"), serves(1, "all_reduce", "runs"))),
        ("all ranks spin in one call", job(spins(0), spins(1))),
        ("one spins, and the other is at another line in each look",
         job(spins(0), rank(1, "runs", line=(3, 9), **RUNS))),
        ("a rank that is runnable gets no processor", job(rank(0), rank(1, state="R"), rank(2), extra=[meshed(1)])),
        ("a backward pass may wait in an all-reduce", job(rank(0, "backward"), rank(1))),
        ("a wait for a queued operation may be for any", job(rank(0, "wait"), rank(1, "barrier"))),
        ("all wait in the same call", job(rank(0), rank(1), rank(2))),
        ("no stack, and two ranks run",
         job(rank(0, stack=False), rank(1, stack=False, **RUNS), rank(2, stack=False, **RUNS))),
        ("no stack, and a device's waiter spins",
         job(rank(0, stack=False), rank(1, stack=False, **RUNS), extra=[Note("devices", "")])),
        ("a rank ended while the others go on",
         job(rank(0, moves=True, cpu_s=1.0, line=(3, 9)), rank(1, state=("S", "X"), stack=False))),
    ],
)  # fmt: skip
def test_nobody_is_named_where(why, records):
    diagnosis = diagnose(records)
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits) == NOBODY, (why, diagnosis)


def test_where_no_rank_waits_the_place_of_each_is_given():
    """One rank computes without the others, and another one sleeps."""
    diagnosis = diagnose(job(rank(0, "runs", line=(3, 9), **RUNS), rank(1, "runs")))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("inconclusive", (), ()), diagnosis
    assert "rank 1 did nothing between the two looks" in diagnosis.summary[0]
    assert "step (train.py:9)" in diagnosis.summary[1] and "step (train.py:10)" in diagnosis.summary[2]


def test_one_look_names_nobody():
    once = [record for record in job(rank(0), rank(1, "runs", **RUNS)) if getattr(record, "look", 1) != 2]
    once = [record for record in once if "look2" not in str(getattr(record, "source", ""))]
    assert diagnose(once).verdict == "inconclusive"


WAITERS = rank(0, "lock", moves=True), rank(2, "lock", moves=True)


@pytest.mark.parametrize(
    ("holder", "locks", "expected"),
    [
        (rank(1, "runs", **RUNS), [lock([101], [100, 102], 1), lock([101], [100, 102], 2)], ("slow", "", (1,), ())),
        (rank(1), [lock([101], [100, 102], 1), lock([101], [100, 102], 2)], ("deadlock", "lock", (1,), ())),
        (rank(1, "runs"), [lock([101], [100, 102], 1), lock([101], [100, 102], 2)], ("stall", "host", (1,), ())),
        (rank(1, "lock", moves=True), [lock([], [100, 101, 102], 1), lock([], [100, 101, 102], 2)],
         ("deadlock", "lock", (), ())),
        (rank(1, "lock", moves=True), [lock([], [100, 102], 1, hidden=1), lock([], [100, 102], 2, hidden=1)],
         ("inconclusive", "", (), ())),
        (rank(1, "lock", moves=True), [lock([999], [100], 1, names=("pip",)), lock([999], [100], 2, names=("pip",))],
         ("inconclusive", "", (), ())),
    ],
)  # fmt: skip
def test_a_lock_is_judged_by_who_holds_it(holder, locks, expected):
    records = job(*WAITERS, holder, extra=locks)
    assert verdict(records) == expected, diagnose(records)


def test_a_lock_that_changes_hands_between_the_looks_is_no_deadlock():
    records = job(*WAITERS, rank(1, "lock", moves=True), extra=[lock([101], [100], 1), lock([], [100], 2)])
    assert diagnose(records).verdict == "inconclusive"


def test_a_baton_that_vanished_between_the_looks_is_no_deadlock():
    records = job(*WAITERS, rank(1, "lock", moves=True), extra=[lock([], [100, 101, 102], 1)])
    assert diagnose(records).verdict == "inconclusive"


def test_the_child_of_a_rank_that_holds_the_lock_counts_as_the_rank():
    builder = rank(1, "runs", **RUNS, children=[Child(500, "ninja", "ninja", "S", 4.0, 0.1)])
    records = job(*WAITERS, builder, extra=[lock([500], [100, 102], 1), lock([500], [100, 102], 2)])
    diagnosis = diagnose(records)
    assert (diagnosis.verdict, diagnosis.culprits) == ("slow", (1,)), diagnosis


def test_what_was_hidden_and_that_ranks_are_numbers_stands_in_the_notes():
    notes = [Note("hidden", "no stack of rank 0: the right"), Note("numbered", "numbers of the processes")]
    diagnosis = diagnose(job(rank(0), rank(1, "runs", **RUNS), extra=notes))
    assert diagnosis.notes == ("Not seen: no stack of rank 0: the right.", "Rank numbers: numbers of the processes.")


def test_ranks_of_two_hosts_with_equal_pids_are_joined():
    process = Process(100, "", 1, "worker")
    other = [
        dataclasses.replace(record, process=process, **({"host": "other"} if isinstance(record, ProcessLook) else {}))
        for record in rank(1, "runs", **RUNS)
    ]
    assert verdict(job(rank(0), other)) == ("slow", "straggler", (1,), ())


@pytest.mark.parametrize(
    ("frames", "limit", "shown"),
    [
        (["stat (pathlib.py:1013)", "exists (pathlib.py:1239)", "search (a.py:9)", "main (a.py:2)"], 2, [0, 1, 2]),
        (["poll (multiprocessing/connection.py:9)", "load (a.py:1)"], 1, [0, 1]),
        (["wait (/usr/lib/python3.11/threading.py:3)", "f (/usr/lib/python3.11/site-packages/x.py:2)"], 1, [0, 1]),
        (["step (a.py:1)", "exists (pathlib.py:1239)", "main (a.py:2)"], 2, [0, 1]),
        (["wait (threading.py:3)"], 2, [0]),
    ],
)
def test_where_the_innermost_frames_are_python_s_own_the_program_s_is_shown_too(frames, limit, shown):
    assert program_frames(frames, limit) == " < ".join(frames[index] for index in shown)
