"""The parser: whatever a recorder writes is read back, and whatever happens to the bytes later is named."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import make_recorder

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.compact import compact
from repro.trace.witness.file import Witness, WitnessError, parse, read
from repro.trace.witness.format import (
    CRC,
    GUARD,
    HEADER,
    LIVE,
    LIVE_AT,
    MAX_BYTES,
    MAX_STRINGS,
    RECORD,
    SPARE_AT,
    Event,
    Geometry,
    Identity,
    Kind,
    is_whole,
    pack_header,
    pack_string,
    unguarded,
)
from repro.trace.witness.parse import MAX_PROBLEMS, Problems

SHAPE = Geometry(ring_records=32, vector_words=32, string_bytes=2048, group_slots=4)
QUICK = settings(max_examples=80)
MEMBERS = {"dp": (0, 1), "ep": (0, 1), "tp": (1, 0)}

calls = st.builds(
    Collective,
    st.sampled_from(sorted(MEMBERS)),
    st.sampled_from(("all_reduce", "all_gather_v", "broadcast")),
    st.sampled_from(("", "layers.0.mlp", "layers.1.mlp")),
    st.lists(st.integers(0, 2**40), max_size=9).map(tuple),
    st.sampled_from(("float32", "int32")),
    st.sampled_from(("", "sum")),
    st.sampled_from((-1, 0, 1)),
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("call"), calls),
        st.tuples(st.just("enter"), calls),
        st.tuples(st.just("issue"), calls),
        st.tuples(st.just("phase"), st.sampled_from(("load", "serve"))),
        st.tuples(st.just("step"), st.integers(0, 2**40)),
        st.tuples(st.just("local"), st.sampled_from(("lock_wait", "lock_held", "build_begin", "heartbeat"))),
    ),
    max_size=60,
)


class Model:
    """What a recorder should have written, kept beside it."""

    def __init__(self) -> None:
        self.data, self.recorder = make_recorder(0, 2, self._tick, SHAPE)
        self.events: list[tuple[Any, ...]] = []
        self.beats = 0
        self._now = 0
        self._seqs: dict[str, int] = {}
        self._step, self._phase = -1, ""
        self.recorder.groups(MEMBERS)

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _add(self, kind: Kind, seq: int = 0, text: str = "", sizes: tuple[int, ...] | None = None) -> None:
        self.events.append((kind, self._now, seq, self._step, self._phase, text, sizes))

    def do(self, action: str, what: Any) -> None:
        match action:
            case "call" | "enter" | "issue":
                self._issue(action, what)
            case "phase":
                self._phase = what
                self.recorder.phase(what)
                self._add(Kind.PHASE)
            case "step":
                self._step = what
                self.recorder.begin_step(what, (ScheduleEntry("dp", "all_reduce"),), 3)
                self._add(Kind.STEP, text="dp\x1fall_reduce\x1f")
            case _:
                self.recorder.local(what, f"name of {what}")
                if what == "heartbeat":
                    self.beats = self._now
                else:
                    self._add(Kind[what.upper()], text=f"name of {what}")

    def _issue(self, action: str, call: Collective) -> None:
        self._seqs[call.group] = seq = self._seqs.get(call.group, 0) + 1
        text = "\x1f".join((call.group, call.op, call.layer, call.dtype, call.reduce_op))
        if action == "issue":
            assert self.recorder.issue(call) == seq
        else:
            self.recorder.enter(call)
        self._add(Kind.ISSUE if action == "issue" else Kind.ENTER, seq, text, call.sizes)
        if action == "call":
            self.recorder.leave(call)
            self._add(Kind.LEAVE, seq, text)


def written(witness: Witness, event: Event, sizes: bool) -> tuple[Any, ...]:
    vector = witness.sizes(event.vector, event.num_sizes) if sizes else None
    text = witness.text(event.sig)
    return Kind(event.kind), event.t_ns, event.seq, event.step, witness.text(event.phase), text, vector


def recorded(steps: list[tuple[str, Any]]) -> Model:
    model = Model()
    for action, what in steps:
        model.do(action, what)
    return model


@QUICK
@given(actions)
def test_what_is_recorded_is_what_is_read(steps: list[tuple[str, Any]]) -> None:
    model = recorded(steps)
    witness = parse(bytes(model.data), "x")
    assert witness.problems == () and witness.complete and not witness.damaged
    assert witness.num_events == len(model.events)
    expected = model.events[-SHAPE.ring_records :]
    assert len(expected) == len(list(witness.events()))
    for event, row in zip(witness.events(), expected, strict=True):
        read_back = written(witness, event, row[-1] is not None)
        # The sizes of an event may be overwritten before the event is; then they are unknown, not wrong.
        assert read_back == row or (read_back[:-1] == row[:-1] and read_back[-1] == () and len(row[-1]) > 1), event
    assert witness.heartbeat_ns == model.beats
    assert [(group.name, group.members) for group in witness.groups] == list(MEMBERS.items())
    for group in witness.groups:
        issues = [row for row in model.events if row[-1] is not None and row[5].startswith(f"{group.name}\x1f")]
        assert group.issued == len(issues)
        assert (group.last.t_ns if group.last else None) == (issues[-1][1] if issues else None)


def in_vectors(data: bytes) -> set[int]:
    """The bytes of the vectors that a record names. Between them are the rests of vectors that were overwritten."""
    live = set()
    for offset, num_sizes in parse(bytes(data), "x").vectors:
        at = SHAPE.vectors_at + offset % SHAPE.vector_words * 8
        live |= set(range(at, at + 8 * (1 + num_sizes)))
    return live


@QUICK
@given(actions, st.randoms(use_true_random=False))
def test_a_flipped_bit_is_named(steps: list[tuple[str, Any]], rng: random.Random) -> None:
    data = recorded(steps).data
    silent = set(range(SPARE_AT, SPARE_AT + 128)) | set(range(SHAPE.vectors_at, SHAPE.strings_at)) - in_vectors(data)
    at = rng.choice([at for at, byte in enumerate(data) if byte and at not in silent])
    data[at] ^= 1 << rng.randrange(8)
    try:
        witness = parse(bytes(data), "x")
    except WitnessError as error:
        assert str(error).startswith("x:")
        return
    assert witness.problems and all(line.startswith("x:") for line in witness.problems), at
    assert not witness.complete, at


@QUICK
@given(actions, st.integers(0, 99))
def test_a_block_of_zeros_in_the_place_of_bytes_is_named(steps: list[tuple[str, Any]], place: int) -> None:
    """As a disk leaves it whose blocks were not all written before a reset."""
    data = bytes(recorded([("phase", "load"), ("phase", "serve"), *steps]).data)
    blocks = [at for at in range(0, len(data), 512) if any(data[at : at + 512])]
    at = blocks[place % len(blocks)]
    try:
        witness = parse(data[:at] + bytes(512) + data[at + 512 :], "x")
    except WitnessError as error:
        assert str(error) == "x:0: this is not a witness file"
        return
    assert witness.damaged or all(SHAPE.vectors_at <= at + byte < SHAPE.strings_at for byte in (0, 511)), at


@QUICK
@given(actions, st.floats(0, 1))
def test_a_cut_file_is_named(steps: list[tuple[str, Any]], share: float) -> None:
    data = bytes(recorded(steps).data)
    size = int(share * (len(data) - 1))
    try:
        witness = parse(data[:size], "x")
    except WitnessError as error:
        assert str(error) == f"x:{size}: the file ends inside its header"
        return
    assert witness.problems[0] == f"x:{size}: damage: the file ends early: its header says {len(data)} bytes"
    whole = parse(data, "x")
    assert set(witness.events()) <= set(whole.events())


@QUICK
@given(actions)
def test_the_compact_file_says_the_same_at_the_same_offsets(steps: list[tuple[str, Any]]) -> None:
    data = bytes(recorded(steps).data)
    before = parse(data, "x")
    short = compact(data, "x")
    after = parse(short, "x")
    assert len(short) <= len(data) and after.problems == ()
    assert (after.writer, after.strings, after.groups, after.vectors) == (
        before.writer, before.strings, before.groups, before.vectors
    )  # fmt: skip
    assert list(after.events()) == list(before.events())
    assert all(after.line(event.n) == before.line(event.n) for event in before.events())
    assert (after.num_events, after.first_event, after.heartbeat_ns, after.heartbeat) == (
        before.num_events, before.first_event, before.heartbeat_ns, before.heartbeat
    )  # fmt: skip


@QUICK
@given(actions, st.randoms(use_true_random=False))
def test_damage_is_still_named_in_the_compact_file(steps: list[tuple[str, Any]], rng: random.Random) -> None:
    data = recorded([*steps, ("phase", "serve")]).data
    used = [at for at, byte in enumerate(data) if byte and at >= LIVE_AT and not SPARE_AT <= at < SPARE_AT + 128]
    data[rng.choice(used)] ^= 1 << rng.randrange(8)
    before = parse(bytes(data), "x")
    after = parse(compact(bytes(data), "x"), "x")
    assert after.damaged == before.damaged and bool(after.problems) == bool(before.problems)
    assert list(after.events()) == list(before.events())


def test_a_compact_file_of_few_events_is_short_and_keeps_its_damage_when_it_was_cut() -> None:
    shape = Geometry()
    writer = Identity(0, 1)
    data = bytearray(shape.file_bytes)
    data[:LIVE_AT] = pack_header(writer, shape)
    recorder = Recorder(data, writer, shape)
    recorder.groups({"dp": (0,)})
    for _ in range(10):
        recorder.enter(Collective("dp", "all_reduce", "", (4,)))
        recorder.leave(Collective("dp", "all_reduce", "", (4,)))
    short = compact(bytes(data), "x")
    assert len(short) < 40_000 < len(data) == 2_819_072
    cut = parse(compact(bytes(data[:500_000]), "x"), "x")
    assert cut.problems[0].startswith("x:500000: damage: the file ends early")


def test_strings_and_writer_of_a_compact_file_may_be_others() -> None:
    model = recorded([("phase", "serve"), ("call", Collective("dp", "all_reduce", "secret", (4,)))])
    short = compact(
        bytes(model.data), "x", writer=Identity(0, 2, hostname="host-1"), change=lambda text: text.replace("secret", "")
    )
    witness = parse(short, "x")
    assert witness.problems == () and witness.writer.hostname == "host-1"
    assert b"secret" not in short and b"host0" not in short
    assert [group.name for group in witness.groups] == ["dp", "ep", "tp"]
    emptied = parse(compact(bytes(model.data), "x", change=lambda text: ""), "x")
    assert set(emptied.strings[1:]) == {"?"} and emptied.problems == ()  # an entry of no bytes would end the area


@pytest.mark.parametrize("value", [0, 1, 12, 16_385, 2**31, 2**40])
def test_a_guarded_word_shows_every_flipped_bit(value: int) -> None:
    word = value * GUARD
    assert unguarded(word) == value
    assert all(unguarded(word ^ 1 << bit) is None for bit in range(64))


def test_one_call_checks_any_number_of_records() -> None:
    model = recorded([("call", Collective("dp", "all_reduce", "", (number,))) for number in range(8)])
    records = bytes(model.data[SHAPE.ring_at : SHAPE.ring_at + 16 * RECORD.size])
    assert is_whole(records) and is_whole(records[RECORD.size :]) and is_whole(b"")
    for at in range(len(records)):
        assert not is_whole(records[:at] + bytes([records[at] ^ 16]) + records[at + 1 :]), at


def test_problems_beyond_the_first_are_counted() -> None:
    problems = Problems("x")
    for at in range(MAX_PROBLEMS + 5):
        problems.damage(at, "wrong")
    assert len(problems.lines()) == MAX_PROBLEMS + 1
    assert problems.lines()[-1] == "x: 5 further problems"


def header_of(ring_records: int, vector_words: int, string_bytes: int, group_slots: int) -> bytes:
    """A header with a right checksum and any geometry."""
    body = bytearray(pack_header(Identity(0, 1), Geometry())[: HEADER.size])
    struct.pack_into("<IIII", body, 24, ring_records, vector_words, string_bytes, group_slots)
    return bytes(body) + CRC.pack(zlib.crc32(body))


def test_a_file_larger_than_any_recorder_makes_is_refused_by_its_length_or_its_header(tmp_path: Path) -> None:
    """120 MB of two-letter strings took a gigabyte and 40 s."""
    header = header_of(64, 64, 120_000_000, 4)
    with pytest.raises(WitnessError, match=r"x:24: witness string_bytes = 120000000 is not an even number in 2\.\."):
        parse(header, "x")
    path = tmp_path / "rank000.wit"
    path.write_bytes(header)
    os.truncate(path, 120_000_000)
    with pytest.raises(WitnessError, match=rf"rank000\.wit:0: larger than {MAX_BYTES} bytes"):
        read(path)
    assert MAX_BYTES < 100 << 20


def test_of_millions_of_short_strings_a_reader_reads_no_more_than_a_recorder_writes() -> None:
    shape = Geometry(ring_records=2, vector_words=2, string_bytes=1 << 23, group_slots=2)
    entry = pack_string(b"ab")
    header = pack_header(Identity(0, 1), shape).ljust(shape.strings_at, b"\0")
    data = header + entry * (shape.string_bytes // len(entry))
    witness = parse(data.ljust(shape.file_bytes, b"\0"), "x")
    assert len(witness.strings) == MAX_STRINGS + 1
    assert witness.problems == (
        f"x:{shape.strings_at + MAX_STRINGS * len(entry)}: damage: more than {MAX_STRINGS} strings",
    )


def test_a_group_of_millions_of_members_has_none() -> None:
    shape = Geometry(ring_records=2, vector_words=2, string_bytes=1 << 22, group_slots=2)
    data = bytearray(shape.file_bytes)
    data[:LIVE_AT] = pack_header(Identity(0, 1), shape)
    recorder = Recorder(data, Identity(0, 1), shape)
    recorder.groups({"dp": range(500_000)})
    (group,) = parse(bytes(data), "x").groups
    assert (group.name, group.members) == ("dp", ())


def test_counters_that_promise_more_than_there_is_are_damage() -> None:
    model = recorded([("phase", "serve")])
    for place, words in ((0, "event 2 of 9 is missing"), (2, "string 7 of 9 is missing")):
        data = bytearray(model.data)
        counts = list(LIVE.unpack_from(data, LIVE_AT))
        counts[place] = 9 * GUARD
        LIVE.pack_into(data, LIVE_AT, *counts)
        assert any(words in line for line in parse(bytes(data), "x").problems), parse(bytes(data), "x").problems
