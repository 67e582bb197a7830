"""Whatever happens to the files on the way here, `diagnose` names no innocent rank and no deadlock that is none."""

from __future__ import annotations

import random

import pytest
from foreign import write
from hangs import CASES, Case
from mishaps import MISHAPS, truncate

from repro.ingest.read import read
from repro.verdict.partial import diagnose


def judge(folder, files):
    evidence = read([write(folder, files)])
    return diagnose(evidence.records)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_evidence_gives_the_right_class_and_ranks_under_any_naming_of_the_ranks(tmp_path, name):
    for seed, names in enumerate(([0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1])):
        made = CASES[name](names)
        diagnosis = judge(tmp_path / str(seed), made.files)
        assert (diagnosis.verdict, frozenset(diagnosis.culprits)) == made.whole, (names, diagnosis)


def check(folder, name, seed):
    rng = random.Random(f"{name} {seed}")
    names = rng.sample(range(4), 4)
    made: Case = CASES[name](names)
    possible = [it for it in MISHAPS if it is not truncate or name != "survived"]  # what it survived by is then gone
    files, mishaps = made.files, rng.sample(possible, rng.randint(1, 3))
    for mishap in mishaps:
        files = mishap(files, rng)
    diagnosis = judge(folder / f"{name}-{seed}", files)
    context = f"{name}, seed {seed}, names {names}, {[it.__name__ for it in mishaps]}: {diagnosis}"
    assert set(diagnosis.culprits) <= made.culprits, context
    assert diagnosis.verdict in made.classes, context
    assert diagnosis.verdict == "inconclusive" or diagnosis.refutes, context


@pytest.mark.parametrize("name", CASES)
def test_no_mishap_to_the_files_makes_it_name_an_innocent_rank(tmp_path, name):
    for seed in range(3):
        check(tmp_path, name, seed)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_none_of_many_mishaps_makes_it_name_an_innocent_rank(tmp_path, name):
    for seed in range(3, 60):
        check(tmp_path, name, seed)
