"""overhead.py: from the times of steps to the cost of the recorder."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path

import overhead
import pytest

from repro.attach.record import compiled
from repro.commands.record import SITE

SWITCHED = """
import sys, threading, time, types
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import overhead
import torch, torch.distributed as dist
from repro.attach.record import attendant
from repro.attach.record import rank as this
from repro.attach.vllm import worker
from torch.testing._internal.distributed.fake_pg import FakeStore

attendant.INTERVAL_S = 0.01
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
config = types.SimpleNamespace(world_size=1, world_size_across_dp=2, data_parallel_size=2, data_parallel_rank=0)
worker.current = worker.Worker(this.current, config)
recorder, switch = this.current.recorder, overhead.Switch(Path())
for on in (True, False, True, False):
    switch._switch(on)
    before = recorder.tape.num_events if hasattr(recorder, "tape") else recorder._num_events
    dist.all_reduce(torch.ones(3))
    print((recorder.tape.num_events if hasattr(recorder, "tape") else recorder._num_events) - before)
time.sleep(0.5)
print(*[thread.name for thread in threading.enumerate()])
"""


def rows_of(num_steps: int, cost: float, seed: int = 0, noise: float = 0.1, drift: float = 0.0) -> list[overhead.Row]:
    """The rows that a worker writes for its first steps. cost: of a recorded step, as a share of a step."""
    draw = random.Random(seed)
    rows = []
    for step in range(num_steps):
        on = overhead.is_recorded(step)
        step_ns = int(2e7 * (1 + drift * step) * (1 + cost * on) * draw.lognormvariate(0, noise))
        rows.append((step, int(on), step_ns, step_ns // 2, 9))
    return rows


@pytest.mark.parametrize("cost", [0.0, 0.005, 0.03])
def test_the_interval_holds_the_cost_also_on_a_machine_that_becomes_slower(cost):
    pairs = overhead.pairs_of([rows_of(2000, cost, seed, drift=0.001) for seed in (0, 1)], 2)
    assert len(pairs) == 1000
    mean, low, high = overhead.interval(pairs)
    assert low <= cost <= high and low <= mean <= high and high - low < 0.03, (low, mean, high)


def test_noise_alone_is_no_cost():
    mean, low, high = overhead.interval(overhead.pairs_of([rows_of(4000, 0.0, seed, noise=0.4) for seed in (2, 3)], 3))
    assert abs(mean) < 0.02 and low < 0 < high, (low, mean, high)


def test_half_of_the_steps_are_recorded_and_the_order_within_a_pair_varies():
    steps = [overhead.is_recorded(step) for step in range(400)]
    assert all(first != second for first, second in zip(steps[::2], steps[1::2], strict=True))
    assert 60 < sum(steps[::2]) < 140


def test_only_pairs_of_steps_that_all_ranks_have_are_compared():
    first, second = rows_of(100, 0.0), rows_of(100, 0.0)
    del first[31], second[80]
    assert len(overhead.pairs_of([first, second], 2)) == 48


@pytest.mark.parametrize("pure", ["0", "1"], ids=["compiled", "python"])
def test_a_step_that_is_not_recorded_writes_no_event_and_the_background_thread_goes_on(programs, tmp_path, pure):
    if problem := pure == "0" and compiled.build():
        pytest.skip(problem)
    env = {**os.environ, "HMR_RECORD": str(tmp_path), "HMR_RECORD_PURE": pure, "PYTHONPATH": str(SITE)}
    done = programs.run(SWITCHED, str(Path(overhead.__file__).parent), env=env)
    assert done.stdout.splitlines() == ["2", "0", "2", "0", "MainThread repro record"], done.stdout + done.stderr


@pytest.mark.parametrize("name", overhead.THREADS)
def test_each_step_after_the_warm_up_is_written_with_what_the_thread_costs(tmp_path, monkeypatch, name):
    monkeypatch.setattr(overhead.Switch, "_switch", lambda *_: None)
    monkeypatch.setattr(overhead, "WARM_UP", 8)
    monkeypatch.setattr(overhead, "STEPS_PER_LINE", 16)
    switch, stop = overhead.Switch(tmp_path), threading.Event()

    def compute() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=compute, name=name, daemon=True)
    thread.start()
    try:
        for _ in range(33):
            switch._note()
            time.sleep(0.001)
    finally:
        stop.set()
        thread.join()
    (file,) = tmp_path.glob("steps*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [row[0] for line in lines for row in line["rows"]]
    assert steps == list(range(8, 32)), steps
    assert all(0 < cpu_ns <= wall_ns for cpu_ns, wall_ns in (line["thread"] for line in lines)), lines


@pytest.mark.parametrize(("name", "switched"), [("other", [True, False]), (overhead.PLACEBO, [])])
def test_a_placebo_switches_nothing(tmp_path, monkeypatch, name, switched):
    (tmp_path / name).touch()
    monkeypatch.setattr(overhead, "is_recorded", lambda step: step % 2 == 0)
    calls = []
    monkeypatch.setattr(overhead.Switch, "_switch", lambda _, on: calls.append(on))
    switch = overhead.Switch(tmp_path)
    switch._note()
    switch._note()
    assert calls == switched


def test_calls_below_a_large_frame_take_no_new_chunk():
    def faults_of(call):
        before = overhead._clocks()[2]
        for _ in range(20):
            call()
        return overhead._clocks()[2] - before

    def nested(depth):
        return nested(depth - 1) if depth else 0

    depths = range(1, 300)
    plain = max(faults_of(lambda depth=depth: nested(depth)) for depth in depths)  # a fault a call, at some depth
    most = overhead.in_large_frame(lambda: max(faults_of(lambda depth=depth: nested(depth)) for depth in depths))()
    if plain < 20:
        pytest.skip(f"calls of this Python need no new chunk: {plain} page faults in 20 calls")
    assert most < 10, (most, plain)
