"""Cycles of waits through engines and workers: which rank stands out, and what it may have left out."""

from __future__ import annotations

from repro.trace.foreign.records import Note, Process, Source, Stack
from repro.verdict.partial import diagnose

IDLE = ("idle", "a message: the worker waits in its queue")
ANSWER = ("answer", "a message: the engine waits for an answer of its workers")
ASKS = ("collective", "all_reduce")
AGREES = ("collective", "all_reduce")


def records(workers, engines, looks=2):
    rows = [Note("world", "", Process(), str(len(workers)))]
    for role, places in (("worker", workers), ("engine", engines)):
        for rank, (activity, detail) in enumerate(places):
            process = Process(100 + rank + 50 * (role == "engine"), f"VLLM::{role}{rank}", rank, role)
            for look in range(looks):
                frames = (f"{detail.split()[-1]} (vllm/{role}.py:{rank})",)
                source = Source(f"{role}_{rank}.look{look}.json")
                rows.append(Stack(process, frames, activity, detail, "MainThread", 0, source))
    return rows


def test_the_rank_whose_engine_asks_early_is_a_suspect_and_all_readings_are_given():
    diagnosis = diagnose(records([IDLE, AGREES], [ASKS, ANSWER]))
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits, diagnosis.suspects) == (
        "deadlock", "order", (), (0,),
    ), diagnosis  # fmt: skip
    text = " ".join(diagnosis.summary)
    assert "rank 0 left out an execution, or rank 1 left out the question" in text and "--dp-sync-interval" in text


def test_one_look_is_no_deadlock():
    diagnosis = diagnose(records([IDLE, AGREES], [ASKS, ANSWER], looks=1))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("inconclusive", (), ()), diagnosis


def test_an_idle_server_asks_nothing_and_nobody_stands_out():
    diagnosis = diagnose(records([IDLE, IDLE], [IDLE, IDLE]))
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == ("inconclusive", (), ()), diagnosis
