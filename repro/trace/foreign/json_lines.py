"""Write records of evidence as JSON, one record in each line, and read them back.

A bundle contains such a file, so that a diagnosis can be repeated without the original files. The first line is a
`Header`. Each other line is `[KIND, FIELDS]`: the name of the record's type, and its fields. The file is untrusted, so
each field is converted strictly to its type. A field of a wrong type raises `DamagedFile`.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, get_args

import msgspec

from hybrid_moe_ref.files import DamagedFile, parse_json
from repro.trace.foreign.operations import Calls, Form
from repro.trace.foreign.records import Connections, Group, GroupRecord, Note, Observation, RecorderDump, Source
from repro.trace.knowledge import Knows

FORMAT, VERSION = "observed records of a torch.distributed job", 1
MAX_LINE = 64 << 20


class Header(msgspec.Struct):
    """The first line of a file of records.

    format, version  identify the format of the file of records
    files            names of the original files, from which the records were read
    not_understood   "file:offset: why" for each original file that no reader understood
    """

    format: str
    version: int
    files: list[str]
    not_understood: list[str]


class _Columns(msgspec.Struct):
    """The operations of one rank in one group, as `Calls` has them, with lists in place of arrays, for JSON.

    All lists but `forms` have one value for each operation.
    """

    file: str
    forms: tuple[Form, ...]
    form: list[int]
    seqs: list[int]
    done: list[bool]
    times_s: list[float | None]
    entries: list[int]


class _Dump(msgspec.Struct):
    """The fields of `RecorderDump` in types that JSON has: `order` is a list, and `knows` is an integer."""

    rank: int
    groups: tuple[GroupRecord, ...]
    order: list[int]
    configured: tuple[Group, ...]
    backend: str
    library: str
    wrapped: bool
    at_s: float | None
    source: Source
    knows: int

    def record(self) -> RecorderDump:
        """Convert the fields, which are untrusted, to a `RecorderDump`.

        Raises ValueError if `order` does not have each operation of each group exactly once. Also raises ValueError if
        `knows` has a bit that is no flag of `Knows`; each flag is something that a dump can show.
        """
        counts = Counter(self.order)
        if any(counts.pop(index, 0) != len(record.calls) for index, record in enumerate(self.groups)) or counts:
            raise ValueError("$.order: the list does not have each operation of each group exactly once")
        return RecorderDump(
            self.rank, self.groups, array("H", self.order), self.configured, self.backend, self.library, self.wrapped,
            self.at_s, self.source, Knows(self.knows),
        )  # fmt: skip


class _Pairs(msgspec.Struct):
    """The fields of `Connections` in types that JSON has.

    Each part of `between` is (pid, pid of the other end, number of connections between the two).
    """

    host: str
    look: int
    between: list[tuple[int, int, int]]
    unread: dict[int, int]
    closed: tuple[int, ...]
    source: Source

    @classmethod
    def of(cls, record: Connections) -> _Pairs:
        rows = [(one, other, number) for (one, other), number in record.between.items()]
        return cls(record.host, record.look, rows, record.unread, record.closed, record.source)

    def record(self) -> Connections:
        between = {(one, other): number for one, other, number in self.between}
        return Connections(self.host, self.look, between, self.unread, self.closed, self.source)


KINDS: Mapping[str, type] = {kind.__name__: kind for kind in get_args(Observation)} | {
    RecorderDump.__name__: _Dump,
    Connections.__name__: _Pairs,
}
"""The name of a kind of record -> the type whose fields its JSON has."""


def encode(records: Iterable[Observation], files: Sequence[str], not_understood: Sequence[str]) -> Iterator[bytes]:
    """Yield the lines of a file that contains these records as JSON.

    files           names of the original files, from which the records were read
    not_understood  "file:offset: why" for each original file that no reader understood
    """
    encoder = msgspec.json.Encoder(enc_hook=_written)
    yield encoder.encode(Header(FORMAT, VERSION, list(files), list(not_understood))) + b"\n"
    for record in records:
        fields = _Pairs.of(record) if isinstance(record, Connections) else record
        yield encoder.encode([type(record).__name__, fields]) + b"\n"


def _written(value: Any) -> Any:
    """Convert a value that JSON cannot represent: `Knows` to a number, an array to a list, `Calls` to lists."""
    if isinstance(value, Knows):
        return value.value
    if isinstance(value, array):
        return value.tolist()
    if isinstance(value, Calls):
        times_s = [None if math.isnan(at_s) else at_s for at_s in value.times_s]
        done = list(map(bool, value.done))
        form, seqs, entries = value.form.tolist(), value.seqs.tolist(), value.entries.tolist()
        return _Columns(value.file, value.forms, form, seqs, done, times_s, entries)
    raise NotImplementedError(f"a value of type {type(value).__name__} cannot be written as JSON")


def decode(file: BinaryIO, where: str) -> tuple[list[Observation], list[str], list[str]]:
    """Read a file that `encode` wrote.

    where: the name of the file, for messages

    Returns three lists: the records, the names of the original files, and a line "file:offset: why" for each original
    file that no reader understood. Raises DamagedFile ("file:line: problem") if the file is damaged or has another
    format or version.
    """
    lines = _lines(file, where)
    header: Header = _typed(next(lines, None), Header, f"{where}:1")
    if (header.format, header.version) != (FORMAT, VERSION):
        raise DamagedFile(f"{where}:1: the first line does not have the format and version that this release reads")
    return list(_records(lines, where)), header.files, header.not_understood


def _lines(file: BinaryIO, where: str) -> Iterator[Any]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise DamagedFile(f"{where}:{number}: the line is longer than {MAX_LINE >> 20} MiB")
        try:
            yield parse_json(line, "")
        except DamagedFile as error:
            raise DamagedFile(f"{where}:{number}: {re.sub('^:[0-9]+: ', '', str(error))}") from None


def _records(lines: Iterable[Any], where: str) -> Iterator[Observation]:
    for number, row in enumerate(lines, 2):
        place = f"{where}:{number}"
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str) or row[0] not in KINDS:
            raise DamagedFile(f"{place}: the line is not a record of a known kind")
        record = _typed(row[1], KINDS[row[0]], place)
        if isinstance(record, Note) and record.value.isdigit() and not re.fullmatch("[0-9]{1,12}", record.value):
            raise DamagedFile(f"{place}: $.value: the number has more than 12 digits, or other digits than 0 to 9")
        try:
            yield record.record() if isinstance(record, _Dump | _Pairs) else record
        except (ValueError, OverflowError) as error:
            raise DamagedFile(f"{place}: {error}") from None


def _typed(value: Any, kind: type, where: str) -> Any:
    try:
        return msgspec.convert(value, kind, str_keys=True, dec_hook=_read)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        problem, _, field = str(error).replace("`", "").partition(" - at ")
        raise DamagedFile(f"{where}: {field or '$'}: {problem[:1].lower()}{problem[1:]}") from None


def _read(kind: Any, value: Any) -> Any:
    if kind is not Calls:
        raise NotImplementedError(f"{kind} cannot be read from JSON")
    columns = msgspec.convert(value, _Columns)
    rows = (columns.form, columns.seqs, columns.done, columns.times_s, columns.entries)
    if len({len(row) for row in rows}) != 1:
        raise ValueError("the columns have different lengths")
    if not all(0 <= form < len(columns.forms) for form in columns.form):
        raise ValueError("a form number is outside the list of forms")
    times_s = array("d", (math.nan if at_s is None else at_s for at_s in columns.times_s))
    form, seqs, entries = array("I", columns.form), array("q", columns.seqs), array("q", columns.entries)
    return Calls(columns.forms, form, seqs, bytes(columns.done), times_s, entries, columns.file)
