"""A rewound witness is the one that was read at that moment."""

from __future__ import annotations

import random

import pytest
from scene import Scene
from witness_sample import GATHER, REDUCE, TINY

from repro.trace.witness.file import Witness
from repro.trace.witness.rewind import rewind

BEAT_NS = 77


def moments(num_events: int, seed: int, waits: bool) -> list[Witness]:
    """The witness of a rank in two groups, read after each of its events. waits: whether every call ends."""
    draw = random.Random(seed)
    scene = Scene(2, {"dp": range(2), "ep": range(2)}, shape=TINY)
    seen: list[Witness] = []
    open_calls: list = []
    while len(seen) < num_events:
        if open_calls and (waits or draw.random() < 0.5):
            scene.leave([0], open_calls.pop())
        elif draw.random() < 0.2:
            scene.phase("serve")
        else:
            open_calls = [draw.choice([REDUCE, GATHER])]
            scene.enter([0], open_calls[0])
        witness = scene.witnesses()[0]
        if not seen or witness.num_events > seen[-1].num_events:
            seen.append(witness)
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_a_witness_is_rewound_to_what_was_read_at_each_earlier_moment(seed):
    *earlier, last = moments(24, seed, waits=False)  # fewer than the ring holds
    for before in earlier:
        again = rewind(last, before.num_events, BEAT_NS)
        context = f"seed {seed}, {before.num_events} of {last.num_events} events"
        assert again is not None and again.heartbeat_ns == BEAT_NS, context
        assert (again.num_events, again.complete) == (before.num_events, True), context
        assert list(again.events()) == list(before.events()), context
        assert [(g.issued, g.left, g.last) for g in again.groups] == [
            (g.issued, g.left, g.last) for g in before.groups
        ], context


@pytest.mark.parametrize("seed", range(6))
def test_of_a_ring_that_has_wrapped_a_moment_is_rebuilt_as_it_was_or_not_at_all(seed):
    *earlier, last = moments(60, seed, waits=True)
    outcomes = set()
    for before in earlier:
        again = rewind(last, before.num_events, BEAT_NS)
        outcomes.add(again is None)
        if again is not None:
            context = f"seed {seed}, {before.num_events} of {last.num_events} events"
            assert list(again.events()) == [e for e in before.events() if e.n >= last.first_event], context
            assert [(g.issued, g.left) for g in again.groups] == [(g.issued, g.left) for g in before.groups], context
    assert outcomes == {True, False}, f"seed {seed}"


def test_a_file_with_fewer_events_than_were_judged_gives_nothing():
    last = moments(5, 0, waits=True)[-1]
    assert rewind(last, last.num_events + 1, BEAT_NS) is None
