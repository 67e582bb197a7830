"""A rank that leaves the rhythm of its own steps is named, if the others keep theirs and wait for it."""

from __future__ import annotations

import pytest
from scene import MS, Scene

from hybrid_moe_ref.parallel.observer import Collective
from repro.trace.knowledge import UNDECLARED, Knows
from repro.trace.witness.file import parse
from repro.trace.witness.format import pack_header
from repro.verdict import Facts, judge

GATHER = Collective("dp", "all_gather_into_tensor", "blocks.0", (8,), "float32")
SCATTER = Collective("dp", "reduce_scatter_tensor", "blocks.0", (8,), "float32", "sum")
LOSS = Collective("world", "all_reduce", "", (1,), "float32", "sum")
SAVE = Collective("world", "barrier", "save")
STEP = [GATHER, SCATTER, LOSS]
RANKS = range(4)


class Job(Scene):
    """A job of four ranks that declares no schedule."""

    def __init__(self, knows: Knows = UNDECLARED) -> None:
        super().__init__(len(RANKS), {"dp": list(RANKS), "world": list(RANKS)})
        for rank in RANKS:
            writer = self.recorders[rank]._writer
            object.__setattr__(writer, "knows", knows)
            header = pack_header(writer, self.recorders[rank].shape)
            self.files[rank][: len(header)] = header

    def runs(self, ranks, calls) -> None:
        for rank in ranks:
            for call in calls:
                self.waits([rank], call)
                self.recorders[rank].leave(call)

    def waits(self, ranks, call) -> None:
        for rank in ranks:
            self.recorders[rank].enter(call)  # one line for all calls, so that they have the same call site

    def judged(self):
        witnesses = {rank: parse(bytes(file), f"rank{rank:03d}.wit") for rank, file in enumerate(self.files)}
        facts = Facts(alive=dict.fromkeys(RANKS, True))
        return judge(witnesses, facts, num_ranks=4, now_ns=self.now_ns + 9000 * MS, quiet_window_s=1.0)


def others(rank: int) -> list[int]:
    return [each for each in RANKS if each != rank]


def steps_of(job: Job, count: int = 5) -> None:
    for _ in range(count):
        job.runs(RANKS, STEP)


def test_a_rank_that_skips_a_collective_is_named_with_module_and_place():
    job = Job()
    steps_of(job)
    job.runs(RANKS, [GATHER])
    job.waits([2], LOSS)
    job.waits(others(2), SCATTER)
    verdict = job.judged()
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", (2,)), verdict
    assert verdict.confidence == "likely"
    line = next(line for line in verdict.evidence if "pattern" in line)
    assert line.startswith(
        "rank 2 left the pattern of its earlier steps (3 operations each): all_reduce #6 in group world, "
    )
    assert "came where reduce_scatter_tensor in group dp of blocks.0" in line and "rank002.wit:" in line


def test_a_rank_that_inserts_an_operation_of_its_steps_is_named():
    job = Job()
    steps_of(job)
    job.runs(RANKS, [GATHER, SCATTER])
    job.waits([1], GATHER)
    job.waits(others(1), LOSS)
    verdict = job.judged()
    assert (verdict.culprits, verdict.confidence) == ((1,), "likely"), verdict


def test_a_rank_that_begins_something_rare_is_only_a_suspect():
    job = Job()
    steps_of(job)
    job.runs(RANKS, [GATHER])
    job.waits([3], SAVE)
    job.waits(others(3), SCATTER)
    verdict = job.judged()
    assert (verdict.verdict, verdict.culprits, verdict.suspects) == ("deadlock", (), (3,)), verdict
    assert any("the others should have begun too" in line for line in verdict.evidence)


@pytest.mark.parametrize("broken", [(1, 2), ()])
def test_nobody_is_named_unless_exactly_one_rank_left_its_rhythm(broken):
    job = Job()
    steps_of(job, 5 if broken else 1)
    job.runs(RANKS, [GATHER])
    left = broken or (2,)
    job.waits(left, LOSS)
    job.waits([rank for rank in RANKS if rank not in left], SCATTER)
    verdict = job.judged()
    assert (verdict.verdict, verdict.culprits) == ("deadlock", ()), verdict


def test_a_break_that_lies_many_steps_back_is_no_cause():
    job = Job()
    steps_of(job)
    job.runs([1], [SAVE])
    job.runs(others(1), [SAVE])
    steps_of(job)
    job.waits(RANKS, GATHER)
    assert job.judged().culprits == ()


def test_a_program_that_declares_its_steps_is_not_judged_by_rhythm():
    job = Job(UNDECLARED | Knows.STEPS | Knows.SCHEDULE)
    steps_of(job)
    job.runs(RANKS, [GATHER])
    job.waits([2], LOSS)
    job.waits(others(2), SCATTER)
    assert job.judged().culprits == ()
