"""Records of other tools' evidence: their columns say what each operation was, and JSON gives back what was written."""

from __future__ import annotations

import io
import json
import math
from array import array
from typing import Any

import pytest

from hybrid_moe_ref.files import DamagedFile
from repro.trace.foreign import json_lines
from repro.trace.foreign.json_lines import decode, encode
from repro.trace.foreign.operations import NO_CALLS, NO_NUMBER, Calls, Form, Group
from repro.trace.foreign.recorder_dump import GroupRecord
from repro.trace.foreign.records import Connections, Note, RecorderDump, Source
from repro.trace.knowledge import Knows

FORMS = (
    Form("all_reduce", ((8,),), ("float32",)),
    Form("send", ((4,),), ("int64",), 3),
    Form("recv", ((4,),), ("int64",), 3),
)


def calls(*rows: tuple[int, int, bool, float]) -> Calls:
    """Rows of (form, number, whether it is over, time)."""
    form, seqs, done, times_s = zip(*rows, strict=True)
    entries = array("q", range(100, 100 + len(rows)))
    return Calls(FORMS, array("I", form), array("q", seqs), bytes(done), array("d", times_s), entries, "dump")


QUEUED = calls((0, 1, True, 10.0), (1, NO_NUMBER, True, math.nan), (0, 2, False, math.nan), (2, 7, False, 12.5))


def test_an_operation_has_what_its_columns_say_and_nothing_where_they_are_empty() -> None:
    first, second = QUEUED[:2]
    assert (first.op, first.seq, first.done, first.at_s) == ("all_reduce", 1, True, 10.0)
    assert (second.op, second.seq, second.peer, second.at_s) == ("send", None, 3, None)
    assert QUEUED[3].source == Source("dump", "", 103) and len(QUEUED) == 4
    assert [call.op for call in QUEUED.numbered(2)] == ["all_reduce"] and not QUEUED.numbered(3)
    assert list(QUEUED.ops()) == ["all_reduce", "send", "all_reduce", "recv"]


def test_the_columns_tell_which_operations_are_not_over_and_how_far_the_numbers_go() -> None:
    over = calls((0, 1, True, 1.0))
    assert (QUEUED.pending, QUEUED.unfinished()) == (2, [2, 3])
    assert over.pending is None and not over.unfinished()
    assert calls((0, 1, False, 1.0), (0, 2, False, 2.0)).unfinished() == [0]
    assert (QUEUED.last_number(), QUEUED.last_number(done=True)) == (7, 1)

    def is_collective(form: Form) -> bool:
        return not form.is_transfer

    assert QUEUED.last_number(where=is_collective) == 2 and QUEUED.last_number(done=True, where=is_collective) == 1
    assert NO_CALLS.last_number() is None and QUEUED.last_number(where=lambda form: False) is None
    assert QUEUED.transfers("send", 3) == [1] and QUEUED.transfers("recv", 3) == [3]
    assert QUEUED.transfers("send", 2) == [] and QUEUED.has_transfers and not NO_CALLS.has_transfers
    assert QUEUED.times_by_number() == {1: 10.0, 7: 12.5}


def test_a_dump_gives_the_newest_operations_of_all_groups_in_their_order() -> None:
    other = GroupRecord(Group("1", "ep"), calls((0, 1, True, 9.0), (0, 2, True, 11.0)))
    queued = GroupRecord(Group("0", "dp"), QUEUED)
    dump = RecorderDump(1, (queued, other), array("H", [1, 0, 0, 1, 0, 0]))
    assert dump.newest(3) == [(other, 1), (queued, 2), (queued, 3)]
    assert dump.newest(9) == [(other, 0), (queued, 0), (queued, 1), (other, 1), (queued, 2), (queued, 3)]
    assert queued.pending == QUEUED[2] and other.pending is None


DUMP = RecorderDump(
    1, (GroupRecord(Group("0", "ep", (0, 1)), QUEUED),), array("H", [0] * 4), at_s=12.0, source=Source("dump", "", 1),
    knows=Knows.ORDER | Knows.ARGUMENTS,
)  # fmt: skip
PAIRS = Connections("host", 2, {(10, 11): 3}, {12: 13}, (14,), Source("look", "line 4"))
NOTE = Note("world", "a group of 8", value="8", at_s=1.5, source=Source("log", "line 2"))


def written(*records: Any) -> list[bytes]:
    return list(encode(records, ["dump"], ["log:3: not text"]))


def read(lines: list[bytes]) -> tuple[list[Any], list[str], list[str]]:
    return decode(io.BytesIO(b"".join(lines)), "records.jsonl")


def test_records_are_read_back_as_they_were_written() -> None:
    lines = written(DUMP, PAIRS, NOTE)
    assert len(lines) == 4 and all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    (dump, *others), files, not_understood = read(lines)
    assert (others, files, not_understood) == ([PAIRS, NOTE], ["dump"], ["log:3: not text"])
    (group,) = dump.groups
    assert list(group.calls) == list(QUEUED) and math.isnan(group.calls.times_s[1]) and dump.order == DUMP.order
    for name in ("rank", "at_s", "knows", "source", "wrapped", "configured"):
        assert getattr(dump, name) == getattr(DUMP, name), name


@pytest.mark.parametrize(
    ("line", "change", "says"),
    [
        (0, {"version": 2}, "records.jsonl:1: the first line does not have the format and version"),
        (0, {"format": "another"}, "records.jsonl:1: the first line does not have the format and version"),
        (0, {"files": None}, "records.jsonl:1: $.files: expected array, got null"),
        (1, {"order": [0, 0, 0]}, "records.jsonl:2: $.order: the list does not have each operation"),
        (1, {"order": [0, 0, 0, 0, 1]}, "records.jsonl:2: $.order: the list does not have each operation"),
        (1, {"rank": "1"}, "records.jsonl:2: $.rank: expected int, got str"),
        (3, {"value": "1" * 13}, "records.jsonl:4: $.value: the number has more than 12 digits"),
    ],
)
def test_a_field_that_cannot_be_right_is_refused_with_its_line(line: int, change: dict[str, Any], says: str) -> None:
    lines = written(DUMP, PAIRS, NOTE)
    value = json.loads(lines[line])
    (value if line == 0 else value[1]).update(change)
    lines[line] = json.dumps(value).encode() + b"\n"
    with pytest.raises(DamagedFile) as refused:
        read(lines)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("columns", [{"seqs": [1, 2]}, {"form": [0, 1, 0, 3]}, {"form": [0, 1, 0, -1]}])
def test_columns_of_a_dump_that_do_not_fit_each_other_are_refused(columns: dict[str, list[int]]) -> None:
    lines = written(DUMP)
    value = json.loads(lines[1])
    value[1]["groups"][0]["calls"].update(columns)
    with pytest.raises(DamagedFile, match=r"records.jsonl:2: .*(different lengths|outside the list)"):
        read([lines[0], json.dumps(value).encode()])


@pytest.mark.parametrize("row", [b"{}", b"[]", b'["Note"]', b'["Note", {}, 1]', b'[["Note"], {}]', b'["None", {}]'])
def test_a_line_that_is_no_record_of_a_known_kind_is_refused(row: bytes) -> None:
    with pytest.raises(DamagedFile, match=r"records\.jsonl:2: the line is not a record of a known kind"):
        read([*written(), row])


def test_a_line_that_is_longer_than_any_record_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE", 1 << 20)
    long = json.dumps(["Note", {"kind": "world", "text": "x" * (1 << 20)}]).encode() + b"\n"
    with pytest.raises(DamagedFile, match=r"^records\.jsonl:3: the line is longer than 1 MiB$"):
        read([*written(NOTE), long])
