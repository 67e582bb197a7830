"""Dispatch and combine of vLLM, with a stand-in of its GroupCoordinator: both hooks record the same."""

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
import sys, types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from repro.attach.record import rank as this
from repro.attach.record.start import begin
from repro.attach.vllm import exchange, worker

begin(sys.argv[1])
dist.init_process_group("fake", rank=0, world_size=2)
pair = dist.new_group([0, 1], group_desc="pair")


class GroupCoordinator:
    device_group = dist.group.WORLD

    def all_gatherv(self, input_, dim=0, sizes=None):
        inner = torch.ones(2)
        dist.all_reduce(inner)  # beneath an exchange: no event of its own
        if isinstance(input_, str):
            raise ValueError("no rows")
        return ("gathered", dim, sizes)

    def reduce_scatterv_into_output(self, rows, output, dim=-1, sizes=None):
        return ("combined", dim, sizes)


GroupCoordinator.all_gatherv = exchange.exchanging("all_gather_v", 1)(GroupCoordinator.all_gatherv)
GroupCoordinator.reduce_scatterv_into_output = exchange.exchanging("reduce_scatter_v", 2)(
    GroupCoordinator.reduce_scatterv_into_output
)
group, half = GroupCoordinator(), torch.ones(3, dtype=torch.bfloat16)
print(group.all_gatherv(half, 0, [1, 2]))  # not a worker yet: the all-reduce beneath it is recorded instead
config = types.SimpleNamespace(world_size=1, world_size_across_dp=2, data_parallel_size=2, data_parallel_rank=0)
worker.current = at = worker.Worker(this.current, config)
for step in range(6):
    at.begin_execution(1)
    at.phase("load" if step in (2, 4) else "serve")
    at.begin_step()
    for layer in ("layers.0", "layers.1"):
        with at.rank.in_layer(layer):
            sizes = [1 + step // 2, 2]
            print(group.all_gatherv(half, 0, sizes))
            print(group.all_gatherv([half, torch.ones(2)], sizes=tuple(sizes)))
            print(group.all_gatherv(torch.ones(2, dtype=torch.int32)))
            print(group.reduce_scatterv_into_output(half, half, 0, sizes))
            print(group.reduce_scatterv_into_output(half, half, dim=0, sizes=[7]))
    at.agreed((0, 0))
    at.progress.executing = False
for group.device_group in (pair, dist.group.WORLD, pair):
    group.all_gatherv(half, 0, [8, 9])
try:
    group.all_gatherv("", 0, [3, 4])
except ValueError as error:
    print(error)
try:
    group.all_gatherv()
except TypeError as error:
    print("TypeError" if "all_gatherv" in str(error) else error)
print(group.all_gatherv(half, sizes=["1", "2"]))
print(group.all_gatherv(input_=half, sizes=[5, 6]))
"""


def run(programs: Any, folder: Path, **variables: str) -> tuple[str, list[tuple]]:
    """Run the program. Returns what it printed, and its events without times."""
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), **variables}
    program = folder.with_suffix(".py")
    program.write_text(PROGRAM)
    done = programs.run(program, str(folder), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not recorded" not in done.stderr, done.stderr
    witness = read(next(folder.glob("events/*.wit")))
    events = [
        (Kind(e.kind).name, e.seq, e.step, witness.text(e.sig), witness.text(e.phase),
         witness.text(e.site).partition(":")[2],
         witness.sizes(e.vector, e.num_sizes), e.hash)
        for e in witness.events()
    ]  # fmt: skip
    return done.stdout, events


def test_the_compiled_hook_records_an_exchange_as_the_hook_in_python(programs, tmp_path):
    if problem := compiled.build():
        pytest.skip(problem)
    printed, fast = run(programs, tmp_path / "fast")
    others, slow = run(programs, tmp_path / "slow", HMR_RECORD_PURE="1")
    assert printed == others and len(printed.splitlines()) == 65, printed
    assert [pair for pair in zip(fast, slow, strict=True) if pair[0] != pair[1]] == []
    beneath, *issued = (event for event in fast if event[0] == "ENTER" and "new_group" not in event[3])
    assert "all_reduce" in beneath[3] and not any("all_reduce" in event[3] for event in issued)
    assert len(issued) == 6 * 2 * 5 + 3 + 4
    assert [event[6] for event in issued[:5]] == [(1, 2), (1, 2), (), (1, 2), (7,)]
    assert [event[6] for event in issued[-4:]] == [(3, 4), (), (1, 2), (5, 6)]
    assert {event[4] for event in issued} == {"serve", "load"}
