"""Issued collectives beside the declared schedule: what a deviation reads as, and what it costs to find it."""

from __future__ import annotations

import random

import pytest

from repro.verdict.evidence.alignment import align
from repro.verdict.evidence.steps import Entry, Issued, Step

GROUPS = {"dp": ("dp", (0, 1)), "ep": ("ep", (0, 1))}


class Counting(str):
    """A string that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counting.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def entry(group: str, layer: int) -> Entry:
    return Counting(group), "all_reduce", Counting(f"layers.{layer}")


def step_of(plan: list[Entry], entries: list[Entry], over: bool = False) -> Step:
    issued = [Issued(e, (str(e[0]), (0, 1)), k + 1, k, "", k) for k, e in enumerate(entries)]
    return Step(1, [tuple(plan)], 1, issued, over)


def kinds(plan: str, issued: str, over: bool = False) -> list[tuple[str, int]]:
    """The deviations of a step whose entries are letters: lower case of group dp, upper case of group ep."""

    def entries(letters: str) -> list[Entry]:
        return [("dp" if letter.islower() else "ep", "all_reduce", letter.lower()) for letter in letters]

    return [(d.kind, d.index) for d in align(0, step_of(entries(plan), entries(issued), over), GROUPS)]


@pytest.mark.parametrize(
    ("plan", "issued", "over", "expected"),
    [
        ("aBcD", "aBcD", True, []),
        ("aBcD", "aBc", False, []),
        ("aBcD", "aBc", True, [("skipped", 3)]),
        ("aBcD", "axBcD", True, [("extra", 1)]),
        ("aBcD", "aBcDx", True, [("extra", 4)]),
        ("aBcd", "aBd", True, [("skipped", 2)]),
        ("aBcD", "aD", False, [("skipped", 1)]),
        ("aBcd", "ac", False, [("order", 1)]),
        ("abCD", "baCD", True, [("order", 0)]),
        ("abCD", "CabD", True, [("order", 0)]),
        ("abcd", "aacd", True, [("extra", 1), ("skipped", 1)]),
        ("", "abc", True, []),
    ],
)
def test_a_deviation_is_read_as_what_fits_best_afterwards(
    plan: str, issued: str, over: bool, expected: list[tuple[str, int]]
) -> None:
    assert kinds(plan, issued, over) == expected


@pytest.mark.parametrize("index", range(4))
def test_another_operation_in_the_place_of_the_one_due_is_a_mismatch_and_the_rest_of_the_step_fits(index: int) -> None:
    plan = [entry("ep", k) for k in range(4)]
    issued = list(plan)
    issued[index] = ("ep", "broadcast", issued[index][2])
    deviations = align(0, step_of(plan, issued, over=True), GROUPS)
    assert [(d.kind, d.index, d.entry) for d in deviations] == [("mismatch", index, issued[index])]


@pytest.mark.parametrize(
    "case", ["other names", "reversed", "every second left out", "each twice", "shuffled", "one name"]
)
def test_the_cost_of_a_step_grows_with_its_length_and_not_with_its_square(case: str) -> None:
    def cost(length: int) -> int:
        plan = [entry("ep", k) for k in range(length)]
        entries = {
            "other names": [entry("dp", k) for k in range(length)],
            "reversed": plan[::-1],
            "every second left out": plan[::2],
            "each twice": [e for e in plan for _ in range(2)],
            "shuffled": random.Random(1).sample(plan, length),
            "one name": [entry("ep", 0) for _ in range(length)],
        }[case]
        entries = [(Counting(e[0]), e[1], Counting(e[2])) for e in entries]  # no object is another's
        Counting.compared = 0
        align(0, step_of(plan, entries, over=True), GROUPS)
        return Counting.compared

    short, long = cost(200), cost(800)
    assert long <= 6 * short + 100, f"{short} comparisons for 200 entries, {long} for 800"
