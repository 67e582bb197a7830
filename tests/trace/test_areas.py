"""The writer's growing areas: strings and size vectors, read back by the parser that trusts nothing."""

from __future__ import annotations

import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.trace.recording.string_areas import Strings, Vectors
from repro.trace.witness.format import (
    LIVE,
    LIVE_AT,
    LOST_STRING,
    MAX_STRINGS,
    NO_VECTOR,
    STRING,
    WORD,
    Geometry,
    unguarded,
)
from repro.trace.witness.parse import Problems, parse_live, parse_strings, parse_vectors

QUICK = settings(max_examples=60)
SHAPE = Geometry(ring_records=2, vector_words=16, string_bytes=256, group_slots=2)


def strings_of(data: bytes, shape: Geometry = SHAPE) -> tuple[list[str], tuple[str, ...]]:
    problems = Problems("x")
    strings = parse_strings(data, shape, parse_live(data, problems).strings, problems)
    return strings, problems.lines()


Sizes = tuple[int, ...]


def vectors_of(
    data: bytes, named: set[tuple[int, int]], shape: Geometry = SHAPE
) -> tuple[dict[tuple[int, int], Sizes], tuple[str, ...]]:
    problems = Problems("x")
    vectors = parse_vectors(data, shape, parse_live(data, problems).vector_words, named, problems)
    return {key: tuple(memoryview(words).cast("q")) for key, words in vectors.items()}, problems.lines()


@QUICK
@given(st.lists(st.text(max_size=40), max_size=20))
def test_every_string_that_fits_is_read_back_under_its_number(texts: list[str]) -> None:
    data = bytearray(SHAPE.file_bytes)
    area = Strings(data, SHAPE)
    numbers = [area.intern(text) for text in texts]
    strings, problems = strings_of(bytes(data))
    assert problems == ()
    for text, number in zip(texts, numbers, strict=True):
        assert number == area.intern(text)  # once kept it keeps its number, once lost it stays lost
        if number != LOST_STRING:
            assert strings[number] == text.encode(errors="replace").decode()
    kept = {text for text, number in zip(texts, numbers, strict=True) if number not in (0, LOST_STRING)}
    assert len(strings) == 1 + len(kept)


def test_a_string_that_does_not_fit_leaves_room_for_a_shorter_one() -> None:
    data = bytearray(SHAPE.file_bytes)
    area = Strings(data, SHAPE)
    assert area.intern("x" * 300) == LOST_STRING
    assert area.intern("short") == 1
    assert strings_of(bytes(data)) == (["", "short"], ())


def test_a_string_that_fills_the_area_to_its_last_byte_is_kept() -> None:
    data = bytearray(SHAPE.file_bytes)
    area = Strings(data, SHAPE)
    text = "x" * (SHAPE.string_bytes - 2 * STRING.size - 5)
    assert (area.intern("first"), area.intern(text), area.intern("")) == (1, 2, 0)
    assert strings_of(bytes(data)) == (["", "first", text], ())
    assert area.intern("more") == LOST_STRING and area.intern(text) == 2


def test_a_file_keeps_no_more_strings_than_a_reader_reads() -> None:
    shape = Geometry(ring_records=2, vector_words=2, string_bytes=1 << 21, group_slots=2)
    data = bytearray(shape.file_bytes)
    area = Strings(data, shape)
    numbers = [area.intern(str(number)) for number in range(MAX_STRINGS + 3)]
    assert numbers == [*range(1, MAX_STRINGS + 1), LOST_STRING, LOST_STRING, LOST_STRING]
    strings, problems = strings_of(bytes(data), shape)
    assert (len(strings), problems) == (MAX_STRINGS + 1, ())


def test_threads_that_intern_at_once_share_one_number_for_one_text() -> None:
    shape = Geometry(ring_records=2, vector_words=2, string_bytes=1 << 16, group_slots=2)
    data = bytearray(shape.file_bytes)
    area = Strings(data, shape)
    results: list[list[int]] = []

    def intern() -> None:
        results.append([area.intern(f"text {number % 300}") for number in range(900)])

    threads = [threading.Thread(target=intern) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    strings, problems = strings_of(bytes(data), shape)
    assert problems == () and len(strings) == 301
    assert all(numbers == results[0] for numbers in results)
    assert [strings[number] for number in results[0]] == [f"text {number % 300}" for number in range(900)]


def test_a_text_that_interrupts_the_store_of_another_is_lost_and_damages_nothing() -> None:
    class Interrupting(bytearray):
        """Interns a second text while the first is stored, as a signal handler may."""

        def __setitem__(self, place, value) -> None:  # type: ignore[no-untyped-def]
            inner.append(area.intern("second"))
            super().__setitem__(place, value)

    inner: list[int] = []
    data = Interrupting(SHAPE.file_bytes)
    area = Strings(data, SHAPE)
    thread = threading.Thread(target=lambda: inner.append(area.intern("first")), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert inner == [LOST_STRING, LOST_STRING, LOST_STRING, 1]
    assert strings_of(bytes(data)) == (["", "first"], ())
    assert area.intern("second") == 2


def test_a_missing_string_is_damage_though_the_area_looks_shorter() -> None:
    data = bytearray(SHAPE.file_bytes)
    area = Strings(data, SHAPE)
    area.intern("one")
    area.intern("three")
    second = SHAPE.strings_at + STRING.size + len("one")
    data[second : second + 4] = bytes(4)
    assert strings_of(bytes(data)) == (["", "one"], (f"x:{second}: damage: string 2 of 2 is missing",))


VECTORS = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20).map(tuple), max_size=12)


@QUICK
@given(VECTORS)
def test_the_newest_vectors_are_read_back_and_the_others_are_known_to_be_overwritten(stored: list[Sizes]) -> None:
    data = bytearray(SHAPE.file_bytes)
    area = Vectors(data, SHAPE)
    offsets = [(area.store(sizes), sizes) for sizes in stored]
    named = {(offset, len(sizes)) for offset, sizes in offsets if sizes}
    vectors, problems = vectors_of(bytes(data), named)
    assert problems == ()
    end = unguarded(LIVE.unpack_from(data, LIVE_AT)[1])
    assert end is not None
    for offset, sizes in offsets:
        if offset == NO_VECTOR:
            assert not sizes or len(sizes) >= SHAPE.vector_words
            continue
        assert vectors.get((offset, len(sizes))) in ((sizes,) if offset >= end - SHAPE.vector_words else (None,))


def test_each_thread_that_stores_vectors_reads_its_own_back() -> None:
    shape = Geometry(ring_records=8, vector_words=1 << 16, string_bytes=1 << 10, group_slots=2)
    data = bytearray(shape.file_bytes)
    area = Vectors(data, shape)
    stored: dict[tuple[int, int], Sizes] = {}

    def store(thread: int) -> None:
        for number in range(2000):
            sizes = (thread, number, thread)
            stored[area.store(sizes), 3] = sizes

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=store, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(stored) == 6000
    assert vectors_of(bytes(data), set(stored), shape) == (stored, ())


@pytest.mark.parametrize("word", range(5))
def test_a_changed_word_of_a_vector_is_damage(word: int) -> None:
    data = bytearray(SHAPE.file_bytes)
    area = Vectors(data, SHAPE)
    area.store((7,) * 3)
    offset = area.store((1, 2, 3, 4))
    data[SHAPE.vectors_at + (offset + word) * WORD.size] ^= 4
    at = SHAPE.vectors_at + offset * WORD.size
    assert vectors_of(bytes(data), {(offset, 4)}) == ({}, (f"x:{at}: damage: 4 sizes do not match their checksum",))
