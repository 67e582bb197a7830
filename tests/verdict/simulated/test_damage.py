"""Damaged evidence through the judge: it is named, and nobody is convicted by it.

pytest -m full tests/verdict/simulated/test_damage.py        3,000 flipped bits and 1,000 cuts
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from drawn_case import Case
from faults import draw
from simulator import Simulation
from test_simulated import is_harmless, report, rest, verdict_of
from truth import Truth, truth

from repro.trace.witness.file import Witness, WitnessError, parse
from repro.trace.witness.format import SPARE_AT, Geometry
from repro.trace.witness.parse import parse_header

PER_RUN = 20
MOST_RANKS = 8
Damage = Callable[[bytes, random.Random], tuple[int, bytes]]


@dataclass(frozen=True)
class Damaged:
    """One simulated run with one damaged file; ``witness`` is None where the reader refuses the file."""

    case: Case
    sim: Simulation
    want: Truth
    rank: int
    at: int
    witness: Witness | None
    refusal: str

    @property
    def place(self) -> str:
        return f"seed {self.case.seed}, byte {self.at} of rank {self.rank}"


def damaged_runs(num: int, damage: Damage) -> Iterator[Damaged]:
    """Simulated runs of all faults, each with ``PER_RUN`` different damages to one of its files."""
    seed = 0
    while num > 0:
        case = draw(seed)
        seed += 1
        if case.num_ranks > MOST_RANKS:
            continue
        rng = random.Random(seed)
        sim = rest(case)
        want = truth(case, sim)
        for _ in range(min(num, PER_RUN)):
            num -= 1
            rank = rng.randrange(case.num_ranks)
            at, data = damage(bytes(sim.files[rank]), rng)
            try:
                yield Damaged(case, sim, want, rank, at, parse(data, f"rank{rank:03d}.wit"), "")
            except WitnessError as error:
                yield Damaged(case, sim, want, rank, at, None, str(error))


def flip(data: bytes, rng: random.Random) -> tuple[int, bytes]:
    """Flip one bit of a byte that says something."""
    used = [at for at, byte in enumerate(data) if byte and not SPARE_AT <= at < SPARE_AT + 128]
    at = rng.choice(used)
    return at, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> tuple[int, bytes]:
    """End the file early, mostly where something is written."""
    used = len(data.rstrip(b"\0"))
    at = rng.randrange(used) if rng.random() < 0.8 else rng.randrange(len(data))
    return at, data[:at]


def check_damage(num: int, damage: Damage) -> None:
    areas: Counter[str] = Counter()
    for run in damaged_runs(num, damage):
        witnesses = {rank: witness for rank, witness in run.sim.witnesses().items() if rank != run.rank}
        if run.witness is None:
            assert f"rank{run.rank:03d}.wit:" in run.refusal, run.place
        else:
            witnesses[run.rank] = run.witness
            assert any(": damage: " in line for line in run.witness.problems), (run.place, run.witness.problems)
            assert run.witness.damaged and not run.witness.complete, run.place
        got = verdict_of(run.case, run.sim, witnesses)
        text = functools.partial(report, run.case, run.sim, run.want, got, str(run.place))
        assert is_harmless(run.want, got, whole=False), text()
        if run.witness is not None:
            assert run.rank not in got.culprits, text()
            assert got.confidence != "certain", text()
            assert got.verdict != "clean", text()
        areas[area(run)] += 1
    print(f"{num} damaged files, none unnoticed, no wrong culprit: {dict(areas)}")


def area(run: Damaged) -> str:
    shape: Geometry = parse_header(bytes(run.sim.files[run.rank]), "x")[1]
    starts = {
        "header": 0, "live": 512, "groups": 1024, "ring": shape.ring_at, "vectors": shape.vectors_at,
        "strings": shape.strings_at,
    }  # fmt: skip
    return [name for name, start in starts.items() if start <= run.at][-1]


def test_one_flipped_bit_is_named_and_convicts_nobody() -> None:
    check_damage(200, flip)


def test_a_file_cut_short_is_named_and_convicts_nobody() -> None:
    check_damage(60, cut)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_three_thousand_flipped_bits_are_named_and_convict_nobody() -> None:
    check_damage(3_000, flip)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_thousand_cut_files_are_named_and_convict_nobody() -> None:
    check_damage(1_000, cut)
