"""A rank that waits in the backward pass of DistributedDataParallel, where only the attendant can note the wait."""

from __future__ import annotations

from pathlib import Path

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.record import ddp
from repro.attach.record.rank import Rank
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import read
from repro.trace.witness.format import Kind


def test_each_pass_notes_its_wait_once_so_that_a_rank_that_hangs_becomes_silent(tmp_path: Path, monkeypatch):
    recorder = Recorder.open(tmp_path / "w", 0, 2)
    rank = Rank(recorder, 0, tmp_path)
    monkeypatch.setattr(ddp, "_passes", [])
    monkeypatch.setattr(ddp, "_noted", [])
    averages = Collective("world.ddp", "ddp_average_gradients", "DistributedDataParallel")
    for _ in range(2):
        ddp._passes[:] = [(averages, recorder.issue(averages))]
        for _ in range(5):
            ddp.note_wait(rank)
        recorder.leave(*ddp._passes.pop())
    ddp.note_wait(rank)
    kinds = [event.kind for event in read(tmp_path / "w").events()]
    assert kinds == [Kind.ISSUE, Kind.WAIT, Kind.LEAVE] * 2
