"""Shorten a copy of a witness file for a bundle. The original is preallocated, so most of its bytes are empty."""

from __future__ import annotations

from collections.abc import Callable

from repro.trace.witness.format import (
    GROUPS_AT,
    HEART,
    HEART_AT,
    LIVE_AT,
    RECORD,
    WORD,
    Geometry,
    Identity,
    pack_header,
    pack_string,
)
from repro.trace.witness.parse import Live, Problems, parse_header, parse_live, parse_strings


def compact(
    data: bytes, name: str, *, writer: Identity | None = None, change: Callable[[str], str] = lambda text: text
) -> bytes:
    """Return the bytes of a shorter witness file, with the same events, sizes and groups. Only unused space is dropped.

    data    the bytes of a witness file
    name    the name of the file, for messages
    writer  the writer in the new header; None: the writer of ``data``
    change  called with each string of the witness; returns the text that replaces the string, for example without
            secrets. If it returns "", the string becomes "?"

    Damage stays visible in the result. For example, if ``data`` was cut off (it is shorter than its header says), the
    result has the same length as ``data``.

    Raises WitnessError if ``data`` is not a witness, ValueError if the new strings are too long for a witness.
    """
    old_writer, shape = parse_header(data, name)
    whole = data.ljust(shape.file_bytes, b"\0")
    problems = Problems(name)
    live = parse_live(whole, problems)
    strings = parse_strings(data, shape, None, problems)[1:]
    entries = b"".join(pack_string(change(text).encode(errors="replace") or b"?") for text in strings)
    short = _fitted(whole, shape, live, len(entries)) if len(data) >= shape.file_bytes else shape
    areas = (
        (pack_header(writer or old_writer, short), LIVE_AT),
        (whole[LIVE_AT : HEART_AT + HEART.size], GROUPS_AT - LIVE_AT),
        (whole[GROUPS_AT : shape.ring_at], shape.ring_at - GROUPS_AT),
        (whole[shape.ring_at : shape.vectors_at], short.vectors_at - short.ring_at),
        (whole[shape.vectors_at : shape.strings_at], short.strings_at - short.vectors_at),
        (entries, short.string_bytes),
    )
    packed = b"".join(area[:size].ljust(size, b"\0") for area, size in areas)
    return packed if len(data) >= shape.file_bytes else packed[: len(data)]


def _fitted(data: bytes, shape: Geometry, live: Live, string_bytes: int) -> Geometry:
    """Return the smallest areas of the file that still contain all events and all vectors (lists of sizes).

    Each event and vector keeps its offset in its area.

    shape         the areas of the original file
    live          how many events, words and strings the writer has counted
    string_bytes  room for the strings of the new file
    """
    records, words = shape.ring_records, shape.vector_words
    if live.events is not None and live.events < records:
        used = _used(data[shape.ring_at : shape.vectors_at], RECORD.size)
        records = min(records, _even(used + 1))  # keep one more, because an incomplete record may follow the last one
    if live.vector_words is not None and live.vector_words <= words:
        used = _used(data[shape.vectors_at : shape.strings_at], WORD.size)
        words = _even(max(live.vector_words, used))
    return Geometry(records, words, _even(string_bytes), shape.group_slots)


def _used(area: bytes, unit: int) -> int:
    """Return how many units, of ``unit`` bytes each, an area has up to its last byte that is not 0."""
    return -(-len(area.rstrip(b"\0")) // unit)


def _even(count: int) -> int:
    return max(2, count + count % 2)
