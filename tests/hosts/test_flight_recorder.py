"""The dump of a process's Flight Recorder, where torch has one recorder or two, or is not imported."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from repro.hosts import flight_recorder

C10D = "torch._C._distributed_c10d"
EMPTY, GLOO, NCCL = b'{"version":"2.10"}', b'{"entries":[{"pg_id":1}]}', b'{"entries":[{"pg_id":2}]}'


def recorders(**dumps):
    return SimpleNamespace(**{f"_dump_{name}_trace_json": lambda *_, d=dump: d for name, dump in dumps.items()})


@pytest.mark.parametrize(
    ("torch", "dumped"),
    [
        (recorders(fr=GLOO), GLOO),
        (recorders(nccl=EMPTY, fr=GLOO), GLOO),
        (recorders(nccl=NCCL, fr=GLOO), NCCL),
        (recorders(nccl=NCCL), NCCL),
        (recorders(nccl=EMPTY, fr=EMPTY), EMPTY),
        (recorders(), None),
    ],
)
def test_the_recorder_that_has_entries_is_dumped(monkeypatch, torch, dumped):
    monkeypatch.setitem(sys.modules, C10D, torch)
    assert flight_recorder.dump() == dumped


def test_a_process_without_torch_has_nothing_to_dump(monkeypatch):
    monkeypatch.delitem(sys.modules, C10D, raising=False)
    assert flight_recorder.dump() is None
