"""verdict.json as a type: what is written is read again, and what is malformed is refused by the path of its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reported import write_hang
from written import written

from hybrid_moe_ref.files import MAX_JSON_BYTES, DamagedFile
from repro.verdict import Facts
from repro.watch.document import Divergence, Document, Side, read_document


@pytest.fixture
def hang(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The verdict.json of a hang, and its content."""
    root, _ = write_hang(tmp_path)
    return root / "verdict.json", json.loads((root / "verdict.json").read_text())


def test_a_document_that_is_written_is_read_again(hang: tuple[Path, dict[str, Any]]) -> None:
    path, content = hang
    document = read_document(path)
    assert written(document) == content
    assert isinstance(document.first_divergence, Divergence) and isinstance(document.sides[0], Side)
    assert [wait.awaited for wait in document.waits] == [(3,), (0, 1, 2)]


def change(content: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    owner: Any = content
    for name in parents:
        owner = owner[int(name) if name.isdigit() else name]
    owner[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("waits.1.for.0", "3", r"$.waits[1].for[0]: expected int, got str"),
        ("ranks.3.rank", 3.5, r"$.ranks[3].rank: expected int, got float"),
        ("ranks.3.rank", True, r"$.ranks[3].rank: expected int, got bool"),
        ("ranks.2.rank", -1, r"$.ranks[2].rank: expected int >= 0"),
        ("ranks.0.sizes.0", 1 << 62, r"$.ranks[0].sizes[0]: expected int <= 4611686018427387903"),
        ("culprits", None, r"$.culprits: expected array, got null"),
        ("first_divergence.sides.0.step", "2", r"$.first_divergence.sides[0].step: expected int, got str"),
        ("quiet_s", -0.5, r"$.quiet_s: expected float >= 0.0"),
        ("seconds.total", "4", r"$.seconds.total: expected float, got str"),
        ("system.lock_holders", {"2": ["a"]}, r"$.system.lock_holders[...]: expected array of length 2, got 1"),
        ("system.alive", {"x": True}, r"expected int, got str"),
        ("verdict", "livelock", r"$: 'livelock' is not a verdict class"),
        ("schema_version", 2, r"$: verdict.json has version 2: this release reads 1"),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_field(
    hang: tuple[Path, dict[str, Any]], path: str, value: Any, problem: str
) -> None:
    file, content = hang
    change(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(DamagedFile) as refused:
        read_document(file)
    assert str(refused.value).startswith(f"{file}:1: ") and problem in str(refused.value)


@pytest.mark.parametrize("name", ["verdict", "culprits", "evidence", "confidence", "quiet_s", "system", "seconds"])
def test_a_document_without_a_field_that_every_run_writes_is_refused(
    hang: tuple[Path, dict[str, Any]], name: str
) -> None:
    file, content = hang
    del content[name]
    file.write_text(json.dumps(content))
    with pytest.raises(DamagedFile, match=f"missing required field {name}"):
        read_document(file)


def test_a_file_of_an_older_release_and_one_with_further_fields_are_read(hang: tuple[Path, dict[str, Any]]) -> None:
    file, content = hang
    for name in ("waits", "suspects", "watcher", "notes", "judged", "interrupted", "ended_by", "skipped", "expected"):
        del content[name]
    content["system"] = {name: {} for name in ("alive", "excused", "lock_holders", "cores", "starved")}
    file.write_text(json.dumps(content | {"colour": "red"}))
    document = read_document(file)
    assert document.system == Facts() and document.look() is None
    assert [wait.ranks for wait in document.waits] == [tuple(link["ranks"]) for link in content["cycle"]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f'{{"x": {"[" * 100}{"]" * 100}}}', "nested too deep"),
        (" " * (MAX_JSON_BYTES + 1), f"larger than {MAX_JSON_BYTES} bytes"),
        (f'{{"ranks": [{"[]," * 600_000}[]]}}', "the values would take more than 128 MiB"),
    ],
)
def test_a_file_without_measure_is_refused_before_it_is_parsed(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "verdict.json").write_text(text)
    with pytest.raises(DamagedFile, match=problem):
        read_document(tmp_path / "verdict.json")


def test_every_field_of_the_type_is_in_the_file(hang: tuple[Path, dict[str, Any]]) -> None:
    assert hang[1].keys() == set(Document.__struct_fields__)
