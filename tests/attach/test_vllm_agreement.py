"""The step agreement of vLLM, with a stand-in of its function: the hook in C records what the hook in Python does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from repro.attach.record import compiled
from repro.trace.witness.file import read
from repro.trace.witness.format import Kind

ROOT = Path(__file__).parents[2]

PROGRAM = """
import random, sys, types

import torch
import torch.distributed as dist

from repro.attach.record import rank as this
from repro.attach.record.start import begin
from repro.attach.vllm import worker

begin(sys.argv[1])
chance = random.Random(int(sys.argv[2]))
dist.init_process_group("fake", rank=0, world_size=2)


def run_ar(rows, *, layer=None):
    "Let all ranks agree."
    dist.all_reduce(torch.ones(8, dtype=torch.int32))
    if isinstance(rows, BaseException):
        raise rows
    return rows


agree = worker.agreeing(run_ar)
print(agree.__name__, agree.__module__, agree.__doc__)
usual, *modes = (torch.tensor([[5, 7], [8, 8], [0, 1], [mode + 1, mode]], dtype=torch.int32) for mode in range(6))
others = [torch.tensor([[5, 7], [8, 8], [1, 1], [2, 1]]), torch.zeros(7, 2), usual.to("meta")]
print(agree(usual).tolist())  # not a worker yet
config = types.SimpleNamespace(world_size=1, world_size_across_dp=2, data_parallel_size=2, data_parallel_rank=0)
worker.current = at = worker.Worker(this.current, config)
kinds = [usual, *modes] * 4 + others
for step in range(300):
    rows, draw = chance.choice(kinds[: len(kinds) - 3 + step // 75]), chance.random()
    at.begin_execution(chance.choice([0, 1, 1, 1, 4]))
    assert agree(rows) is rows
    for layer in ("layers.0", "layers.1")[: 1 if draw < 0.01 else 2]:
        with at.rank.in_layer(layer):
            dist.all_reduce(torch.ones(3))
            if draw > 0.99:
                agree(rows)  # the extra one of a layer
    if draw > 0.995:
        agree(rows)
    at.progress.executing = False
    if 0.1 < draw < 0.13:
        at.phase(chance.choice(["profile", "serve"]))
    if 0.2 < draw < 0.23:
        at.habits.end()  # a question of the engine
    if 0.3 < draw < 0.33:
        agree(rows)  # outside an execution
    if 0.4 < draw < 0.42:
        dist.barrier()
        at.habits.end()
for wrong in (
    ValueError("failed"), [1, 2], torch.zeros(4, 0), torch.zeros(4, 2, 2), KeyboardInterrupt("Ctrl-C"), torch.ones(4),
):
    at.begin_execution(1)
    try:
        print(type(agree(wrong)))
    except BaseException as error:
        print(type(error))
    agree(usual)
    at.progress.executing = False
at.phase("other rows")
for rows in [others[1]] * 5 + [torch.zeros(()), others[1]]:  # what is no row has no plan
    agree(rows)
    dist.barrier()
worker.after_fork()
this.use(None)
print(agree(usual) is usual)
"""


def run(programs: Any, folder: Path, seed: int, **variables: str) -> tuple[str, str, list[tuple]]:
    """Run the program. Returns what it printed, its errors, and its events without times."""
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), **variables}
    program = folder.with_suffix(".py")
    program.write_text(PROGRAM)
    done = programs.run(program, str(folder), str(seed), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    witness = read(next(folder.glob("events/*.wit")))
    events = [
        (Kind(e.kind).name, e.seq, e.step, witness.text(e.sig), e.aux, e.num_sizes, witness.text(e.phase), e.hash)
        for e in witness.events()
    ]
    return done.stdout, done.stderr, events


@pytest.mark.parametrize("seed", range(4))
def test_the_compiled_hook_records_an_agreement_as_the_hook_in_python(programs, tmp_path, seed):
    if problem := compiled.build():
        pytest.skip(problem)
    printed, errors, fast = run(programs, tmp_path / "fast", seed)
    others, other_errors, slow = run(programs, tmp_path / "slow", seed, HMR_RECORD_PURE="1")
    assert printed == others and printed.startswith("run_ar __main__ Let all"), printed
    assert errors == other_errors and errors.count("not recorded") == 1, "the rows that are no tensor are one line"
    assert [pair for pair in zip(fast, slow, strict=True) if pair[0] != pair[1]] == [], f"seed {seed}"
    steps = [event for event in fast if event[0] == "STEP"]
    of_barriers = [event[2] for event in steps if event[3].endswith("barrier\x1f")]
    assert [step - of_barriers[0] for step in of_barriers] == [0, 1, 3], f"seed {seed}: {of_barriers}"
    with_plan = sum("layers.0" in event[3] and "layers.1" in event[3] for event in steps)
    assert len({event[2] for event in steps}) > 300 and with_plan > 30, f"seed {seed}: {with_plan} plans"


def test_an_attribute_of_the_compiled_progress_cannot_be_deleted():
    if problem := compiled.build():
        pytest.skip(problem)
    progress = compiled.load.__wrapped__().Progress()
    for name in ("phase", "agreement", "plans", "kind", "expected", "step"):
        with pytest.raises(TypeError):
            delattr(progress, name)
    assert (progress.phase, progress.agreement, progress.plans, progress.kind, progress.step) == ("", (), {}, None, -1)
