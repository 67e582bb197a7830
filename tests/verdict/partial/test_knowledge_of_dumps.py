"""A column that recorder dumps lack makes the diagnosis weaker, and never names another rank."""

from __future__ import annotations

import itertools
import json
import pickle

import pytest
from foreign import write
from hangs import CASES

from repro.ingest.read import read
from repro.verdict.partial import diagnose

COLUMNS = (
    "state", "retired", "state retired", "input_sizes", "input_sizes output_sizes", "input_dtypes output_dtypes",
    "time_created_ns", "collective_seq_id", "p2p_seq_id", "is_p2p", "process_group", "pg_id", "record_id", "frames",
    "profiling_name", "time_discovered_completed_ns", "pg_config", "pg_status",
)  # fmt: skip
DUMPED = [
    name for name, make in CASES.items()
    if any(data[:1] in (b"\x80", b"{") for data in make([0, 1, 2, 3]).files.values())
]  # fmt: skip


def without(data: bytes, columns: str) -> bytes:
    """The dump without these columns; other files as they are."""
    if data[:1] not in (b"\x80", b"{"):
        return data
    content = json.loads(data) if data[:1] == b"{" else pickle.loads(data)
    for column in columns.split():
        content.pop(column, None)
        for entry in content["entries"]:
            entry.pop(column, None)
    return json.dumps(content).encode() if data[:1] == b"{" else pickle.dumps(content, 2)


@pytest.mark.parametrize("name", DUMPED)
def test_a_column_that_dumps_lack_makes_the_diagnosis_weaker_and_names_nobody_else(tmp_path, name):
    files = CASES[name]([0, 1, 2, 3]).files
    whole = diagnose(read([write(tmp_path / "whole", files)]).records)
    dumps = sorted(file for file, data in files.items() if data[:1] in (b"\x80", b"{"))
    for columns, lacking in itertools.product(COLUMNS, (dumps, dumps[:1], dumps[-1:])):
        poorer = {file: without(data, columns) if file in lacking else data for file, data in files.items()}
        got = diagnose(read([write(tmp_path / "poorer", poorer)]).records)
        text = f"{name}: {columns} taken from {lacking}: {whole} became {got}"
        assert set(got.culprits) <= set(whole.culprits), text
        assert got.verdict in (whole.verdict, "inconclusive"), text
