"""Witness files that are torn, cut or damaged: what can be read is read, and no other rank is named for it."""

from __future__ import annotations

import itertools
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from scene import Scene
from witness_sample import GATHER, REDUCE, SLOT, TINY, sample
from written import written

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import Event, WitnessError, parse
from repro.trace.witness.format import (
    CRC,
    GUARD,
    HEADER,
    KNOWS_AT,
    LAST_AT,
    LEFT_AT,
    LIVE_AT,
    RECORD,
    RESIDUE,
    Identity,
    Kind,
    pack_header,
)
from repro.verdict import Facts, judge


def test_a_file_cut_anywhere_is_read_as_far_as_it_goes_or_refused_by_name() -> None:
    scene = sample()
    whole = bytes(scene.files[1])
    others = scene.witnesses()
    full = others[1]
    for size in range(0, len(whole), 5):
        try:
            witness = parse(whole[:size], "rank001.wit")
        except WitnessError as error:
            assert size < HEADER.size + CRC.size, size
            assert str(error).startswith(f"rank001.wit:{size}:")
            continue
        assert witness.problems[0].startswith(f"rank001.wit:{size}:")
        assert witness.num_events <= full.num_events
        verdict = judge({**others, 1: witness}, num_ranks=4, now_ns=scene.now_ns, quiet_window_s=1.0)
        assert verdict.verdict in ("slow", "inconclusive"), size


@pytest.mark.full
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_cut_file_in_a_hang_never_makes_another_rank_a_culprit(wrapped: bool) -> None:
    """Rank 2 issues one all_reduce too many; its file, or that of a rank that waits for it, ends at any byte."""
    scene = Scene(4, {"dp": range(4), "ep": range(4)}, shape=TINY)
    plan = (ScheduleEntry("dp", "all_reduce"), ScheduleEntry("ep", "all_gather_v", "layers.0.mlp"))
    for step in range(9 if wrapped else 3):
        scene.begin_step(step, plan)
        scene.all_of(range(4), REDUCE)
        scene.enter([0, 1, 3], GATHER)
        if step < (8 if wrapped else 2):
            scene.enter([2], GATHER)
            scene.leave(range(4), GATHER)
    scene.enter([2], REDUCE._replace(layer="extra"))
    others = scene.witnesses()
    assert (others[0].first_event > 1) is wrapped
    for rank in (2, 0):
        whole = bytes(scene.files[rank])
        for size in range(HEADER.size + CRC.size, len(whole), 1 if wrapped else 3):
            witness = parse(whole[:size], f"rank{rank:03d}.wit")
            verdict = judge({**others, rank: witness}, num_ranks=4, now_ns=scene.now_ns + 2 * 10**9, quiet_window_s=1.0)
            assert set(verdict.culprits) <= {2}, (rank, size, verdict)
            assert verdict.verdict in ("deadlock", "slow", "inconclusive"), (rank, size, verdict)


def test_a_writer_killed_at_any_byte_of_a_record_leaves_the_records_before_it() -> None:
    scene = sample()
    before = bytes(scene.files[0])
    scene.leave([0], GATHER)
    after = bytes(scene.files[0])
    at = TINY.ring_at + 14 * RECORD.size
    assert next(i for i in range(TINY.ring_at, TINY.vectors_at) if before[i] != after[i]) == at
    for cut in range(1, RECORD.size):
        witness = parse(before[:at] + after[at : at + cut] + before[at + cut :], "torn")
        if after[at + cut : at + RECORD.size].strip(b"\0"):
            assert witness.num_events == 14
            assert not witness.complete
            assert witness.problems == (f"torn:{at}: torn record: the rank had not finished writing it",)
            assert not witness.damaged


def test_a_lost_live_counter_loses_no_record() -> None:
    data = bytearray(sample().files[0])
    data[LIVE_AT : LIVE_AT + 16] = bytes(16)
    witness = parse(bytes(data), "x")
    assert witness.num_events == 14
    assert witness.problems == (f"x:{LIVE_AT}: damage: the number of events is missing",)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"notawitn", "x:0: this is not a witness file"),
        (8, struct.pack("<I", 1), "x:8: the witness has version 1, but this release reads only version 2"),
        (16, struct.pack("<I", 3), "x:184?: damage: the header does not match its checksum"),
    ],
)
def test_a_header_that_cannot_be_trusted_is_refused(at: int, value: bytes, message: str) -> None:
    data = bytearray(sample().files[0])
    data[at : at + len(value)] = value
    with pytest.raises(WitnessError, match=message.replace("184?", str(HEADER.size))):
        parse(bytes(data), "x")


def test_a_rank_beyond_its_own_number_of_ranks_is_refused() -> None:
    data = bytearray(sample().files[0])
    header = pack_header(Identity(4, 4), TINY)
    data[: len(header)] = header
    with pytest.raises(
        WitnessError,
        match="x:12: the header says rank 4 of 4, with records of 72 bytes; a rank is below",
    ):
        parse(bytes(data), "x")


@pytest.mark.parametrize(("word", "what"), [(0, "events"), (1, "vector words"), (2, "strings"), (3, "groups")])
def test_a_damaged_count_is_named_with_its_place(word: int, what: str) -> None:
    data = bytearray(sample().files[0])
    at = LIVE_AT + 8 * word
    data[at] ^= 1
    witness = parse(bytes(data), "x")
    assert f"x:{at}: damage: the number of {what} does not match its checksum" in witness.problems


def test_a_completion_that_only_the_ring_has_is_named_as_soon_as_it_is_counted() -> None:
    scene = sample()
    scene.leave([0], GATHER)  # event 15, the last one
    struct.pack_into("<Q", scene.files[0], SLOT + LEFT_AT, 3 * GUARD)
    line = f"x:{SLOT + LEFT_AT}: damage: group 1 lacks the completion of #4"
    assert parse(bytes(scene.files[0]), "x").problems == (line,)
    struct.pack_into("<Q", scene.files[0], LIVE_AT, 14 * GUARD)  # the writer died between the two stores
    assert parse(bytes(scene.files[0]), "x").problems == ()


@pytest.mark.parametrize(("field", "value"), [("kind", Kind.LEAVE), ("group", 0), ("seq", 0), ("hash", 5)])
def test_a_record_in_a_groups_slot_that_is_not_its_last_issue_is_named(field: str, value: int) -> None:
    """Somebody has given the record a right check."""
    data = bytearray(sample().files[0])
    at = SLOT + LAST_AT
    event = Event._make(RECORD.unpack_from(data, at))
    RECORD.pack_into(data, at, *event._replace(**{field: value}))
    CRC.pack_into(data, at + RECORD.size - CRC.size, zlib.crc32(data[at : at + RECORD.size - CRC.size], RESIDUE))
    line = f"x:{at}: damage: the slot of group 1 has the record of another event"
    assert line in parse(bytes(data), "x").problems
    RECORD.pack_into(data, at, *event._replace(**{field: value, "n": 900}))  # an event that the ring does not have
    CRC.pack_into(data, at + RECORD.size - CRC.size, zlib.crc32(data[at : at + RECORD.size - CRC.size], RESIDUE))
    assert (line in parse(bytes(data), "x").problems) == (field != "hash")


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(WitnessError, match="x:0: the file ends inside its header"):
        parse(b"", "x")


@pytest.mark.parametrize(
    ("field", "value", "checked"),
    [(field, value, False) for field, value in (("kind", 99), ("n", 7), ("n", 38), ("sig", 1), ("hash", 1))]
    + [("kind", 99, True), ("kind", 0, True), ("n", 7, True)],
)
def test_a_record_that_cannot_be_right_is_named_and_left_out(field: str, value: int, checked: bool) -> None:
    """checked: somebody has given the wrong record a right check."""
    data = bytearray(sample().files[0])
    at = TINY.ring_at + 5 * RECORD.size
    event = Event._make(RECORD.unpack_from(data, at))
    RECORD.pack_into(data, at, *event._replace(**{field: value}))
    if checked:
        CRC.pack_into(data, at + RECORD.size - CRC.size, zlib.crc32(data[at : at + RECORD.size - CRC.size], RESIDUE))
    witness = parse(bytes(data), "x")
    assert witness.problems == (f"x:{at}: damage: event 6 does not match its checksum",)
    assert witness.damaged and not witness.complete
    assert (witness.num_events, witness.first_event) == (14, 7)


def test_random_damage_is_survived() -> None:
    import random

    scene = sample()
    others = scene.witnesses()
    for seed in range(300):
        rng = random.Random(seed)
        data = bytearray(scene.files[2])
        for _ in range(rng.randint(1, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            witness = parse(bytes(data), "x")
        except WitnessError:
            continue
        written(judge({**others, 2: witness}, num_ranks=4, now_ns=scene.now_ns, quiet_window_s=1.0))


@pytest.mark.parametrize(
    ("at", "code", "value", "words"),
    [
        (LIVE_AT, "<Q", 900, "the number of events does not match its checksum"),
        (SLOT, "<I", 900, "the name of group 1 does not match its checksum"),
        (SLOT + LEFT_AT, "<Q", 2**40, "the last completion of group 1 does not match its checksum"),
        (SLOT + LEFT_AT, "<Q", 2**40 * GUARD, "#1099511627776 of group 1 completed, but was never issued"),
        (SLOT + LEFT_AT, "<Q", 2 * GUARD, "group 1 lacks the completion of #3"),
        (SLOT + LAST_AT + 18, "<H", 7, "the last record of group 1 does not match its checksum"),
        (SLOT + LAST_AT + 20, "<B", Kind.LEAVE, "the last record of group 1 does not match its checksum"),
    ],
)
def test_damage_to_what_is_kept_of_a_group_is_named_and_nothing_is_concluded_from_it(
    at: int, code: str, value: int, words: str
) -> None:
    scene = sample()
    for rank in (1, 2):  # in two files alike: neither stands alone
        scene.enter([rank], GATHER)
        struct.pack_into(code, scene.files[rank], at, value)
    witness = scene.witnesses()[1]
    slot = at if at < SLOT + LAST_AT else SLOT + LAST_AT
    assert (f"rank001.wit:{slot}: damage: {words}",) == witness.problems
    assert not witness.complete
    verdict = judge(scene.witnesses(), num_ranks=4, now_ns=scene.now_ns + 2 * 10**9, quiet_window_s=1.0)
    assert verdict.verdict in ("slow", "inconclusive") and not set(verdict.culprits) - {3}, verdict


def test_where_a_rank_with_a_damaged_witness_stands_is_said_to_rest_on_it() -> None:
    scene = sample()
    scene.files[0][TINY.ring_at + 40] ^= 1
    scene.files[2][TINY.strings_at] ^= 1
    verdict = judge(scene.witnesses(), num_ranks=4, now_ns=scene.now_ns + 2 * 10**9, quiet_window_s=1.0)
    assert not {0, 2} & {*verdict.culprits}
    assert "rank 0 waits in ep all_gather_v #4 (serve, layers.0.mlp), by a damaged witness" in verdict.sentences()
    assert "rank 2 left a damaged witness" in verdict.sentences()


def states_of(recorder: Recorder, data: bytearray, do: Callable[[], object]) -> list[bytes]:
    """The file after each line that stores something in it, and with each store cut after any byte."""
    seen = [bytes(data)]

    def trace(frame: Any, event: str, argument: object) -> Any:
        if (now := bytes(data)) != seen[-1]:
            seen.append(now)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(before)
    if bytes(data) != seen[-1]:
        seen.append(bytes(data))
    states = []
    for old, new in itertools.pairwise(seen):
        changed = [at for at, (this, that) in enumerate(zip(old, new, strict=True)) if this != that]
        states += [new[:at] + old[at:] for at in range(changed[0], changed[-1] + 2)]
    return states


@pytest.mark.parametrize("op", ["enter", "leave"])
def test_a_writer_killed_between_or_within_any_two_stores_names_no_other_rank(op: str) -> None:
    scene = sample()
    new = GATHER._replace(layer="layers.1.mlp", sizes=(1, 2, 3, 4))  # its name and its sizes are stored as well
    scene.leave([0], GATHER)
    scene.enter([1, 2, 3], GATHER)
    scene.leave([1, 2, 3], GATHER)
    scene.enter([1, 2, 3], new)
    if op == "leave":
        scene.enter([0], new)
        scene.leave([1, 2, 3], new)
    recorder = scene.recorders[0]
    states = states_of(recorder, scene.files[0], lambda: getattr(recorder, op)(new))
    assert len(states) > 72
    others = scene.witnesses()
    for number, state in enumerate(states):
        witness = parse(state, "rank000.wit")
        verdict = judge(
            {**others, 0: witness},
            Facts(alive={0: False}),
            num_ranks=4,
            now_ns=scene.now_ns + 2 * 10**9,
            quiet_window_s=1.0,
        )
        assert verdict.verdict == "crash" and not set(verdict.culprits) - {0}, (number, witness.problems, verdict)


def test_a_store_into_a_wrapped_vector_ring_that_is_cut_short_mixes_no_old_sizes_with_new_ones() -> None:
    scene = Scene(1, {"ep": [0]}, shape=TINY)
    stored: dict[int, tuple[int, ...]] = {}
    torn = 0
    for number in range(1, 40):
        sizes = tuple(1000 * number + place for place in range(3 + number % 3))
        stored[number] = sizes
        states = states_of(
            scene.recorders[0], scene.files[0], lambda sizes=sizes: scene.enter([0], GATHER._replace(sizes=sizes))
        )
        for state in states if number > 25 else states[-1:]:
            witness = parse(state, "x")
            for event in witness.events():
                read_back = witness.sizes(event.vector, event.num_sizes)
                assert read_back in ((), stored[event.n]), (number, event.n, read_back)
                torn += not read_back
    assert torn, "the ring never wrapped"


def test_a_flipped_bit_in_what_a_recorder_writes_is_damage(tmp_path):
    path = tmp_path / "rank000.wit"
    Recorder.open(path, 0, 2).done()
    data = bytearray(path.read_bytes())
    data[KNOWS_AT] ^= 4
    with pytest.raises(WitnessError, match=rf"^x:{KNOWS_AT}: damage: "):
        parse(bytes(data), "x")
