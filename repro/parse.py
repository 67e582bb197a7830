"""Bytes of a witness file to strings and records, trusting nothing: what cannot be right is named and left out."""

from __future__ import annotations

import zlib

from repro.layout import (
    CRC,
    HEADER,
    LENGTH,
    LOST_STRING,
    MAGIC,
    RECORD,
    VERSION,
    Event,
    Geometry,
    Identity,
    Kind,
    column,
)

_KINDS = frozenset(int(kind) for kind in Kind)


class WitnessError(ValueError):
    """A file that is no witness, or none that this version can read."""


def parse_header(data: bytes, name: str) -> tuple[Identity, Geometry]:
    """The header, or a WitnessError that names file and offset."""
    if len(data) < HEADER.size + CRC.size:
        raise WitnessError(f"{name}:{len(data)}: the file ends inside its header")
    magic, version, record_bytes, rank, num_ranks, *rest = HEADER.unpack_from(data)
    *areas, pid, start, namespace, offset, run, host, boot = rest
    if magic != MAGIC:
        raise WitnessError(f"{name}:0: not a witness file")
    if version != VERSION:
        raise WitnessError(f"{name}:8: witness version {version}, this release reads version {VERSION} only")
    if CRC.unpack_from(data, HEADER.size)[0] != zlib.crc32(data[: HEADER.size]):
        raise WitnessError(f"{name}:{HEADER.size}: the header's checksum is wrong")
    if record_bytes != RECORD.size or rank >= num_ranks:
        raise WitnessError(f"{name}:12: rank {rank} of {num_ranks} with records of {record_bytes} bytes is impossible")
    try:
        shape = Geometry(*areas)
    except ValueError as error:
        raise WitnessError(f"{name}:24: {error}") from None
    run_id, hostname, boot_id = (text.rstrip(b"\0").decode(errors="replace") for text in (run, host, boot))
    return Identity(rank, num_ranks, run_id, hostname, boot_id, pid, start, namespace, offset), shape


def parse_strings(data: bytes, shape: Geometry, name: str, problems: list[str]) -> list[str]:
    strings = [""]
    at, end = shape.strings_at, min(shape.file_bytes, len(data))
    while at + LENGTH.size <= end:
        (length,) = LENGTH.unpack_from(data, at)
        if length == 0:
            break
        at += LENGTH.size
        if at + length > end:
            problems.append(f"{name}:{at - LENGTH.size}: string {len(strings)} of {length} bytes passes the end")
            break
        strings.append(data[at : at + length].decode(errors="replace"))
        at += length
    return strings


def parse_ring(
    data: bytes, shape: Geometry, promised: int, num_strings: int, name: str, problems: list[str]
) -> tuple[bytes, Event | None, bool]:
    """The newest unbroken run of records in order, the last of them, and whether a later one is torn."""
    capacity = shape.ring_records
    used = capacity if not 0 < promised < capacity else min(promised + 1, capacity)
    whole = max(0, min(used, (len(data) - shape.ring_at) // RECORD.size))
    ring = data[shape.ring_at : shape.ring_at + whole * RECORD.size]
    newest = max(column(ring, "n"), default=0)
    cut = newest % capacity * RECORD.size if newest > capacity else 0
    records, torn = ring[cut:] + ring[:cut], False
    if not cut:
        records = records[: newest * RECORD.size]
    if not _is_sound(records, newest, num_strings):
        records, newest, torn = _salvage(ring, shape, num_strings, name, problems)
    last = Event._make(RECORD.unpack_from(records, len(records) - RECORD.size)) if records else None
    return records, last, torn


def _is_sound(records: bytes, newest: int, num_strings: int) -> bool:
    """Whether nothing at all is wrong with records that should end in event ``newest``."""
    numbers = list(range(newest - len(records) // RECORD.size + 1, newest + 1))
    strings = (max(column(records, field), default=0) for field in ("sig", "site", "phase"))
    return (
        column(records, "n") == numbers
        and column(records, "check") == [n & 0xFFFFFFFF for n in numbers]
        and _KINDS.issuperset(column(records, "kind"))
        and all(string < num_strings for string in strings)
    )


def _salvage(ring: bytes, shape: Geometry, num_strings: int, name: str, problems: list[str]) -> tuple[bytes, int, bool]:
    """The newest unbroken run among records of which some are torn or impossible."""
    capacity = shape.ring_records
    good: dict[int, int] = {}
    torn: set[int] = set()
    for slot, row in enumerate(RECORD.iter_unpack(ring)):
        event = Event._make(row)
        if event.n == 0 and event.check == 0:
            continue
        if event.n & 0xFFFFFFFF != event.check or (event.n - 1) % capacity != slot:
            problems.append(f"{name}:{shape.ring_at + slot * RECORD.size}: torn record")
            torn.add(slot)
        elif event.kind not in _KINDS or not all(
            _known(string, num_strings) for string in (event.sig, event.site, event.phase)
        ):
            what = f"impossible record, event {event.n} kind {event.kind}"
            problems.append(f"{name}:{shape.ring_at + slot * RECORD.size}: {what}")
            torn.add(slot)
        else:
            good[event.n] = slot
    newest = oldest = max(good, default=0)
    while oldest - 1 in good:
        oldest -= 1
    slots = [good[n] for n in range(oldest, newest + 1)] if newest else []
    records = b"".join(ring[slot * RECORD.size : (slot + 1) * RECORD.size] for slot in slots)
    # Only a torn record in the place of the next event can hide what the rank does now.
    return records, newest, newest % capacity in torn


def _known(string: int, num_strings: int) -> bool:
    return string < num_strings or string == LOST_STRING
