"""Runs of this program given to `diagnose`: the verdict is that of `watch`."""

from __future__ import annotations

import json

import pytest
from reported import write_hang

from repro import bundle
from repro.bundle import assemble
from repro.commands.cli import main


@pytest.mark.parametrize("packed", [False, True])
def test_diagnose_says_of_a_run_and_of_its_bundle_what_watch_says(tmp_path, capsys, monkeypatch, packed):
    monkeypatch.setattr(assemble, "_environment", lambda recogniser: "")  # which takes seconds
    run, _ = write_hang(tmp_path / "runs")
    if packed:
        run = bundle.make(run, tmp_path / "b.zip").path
    main(["watch", str(run), "--json"])
    watched = json.loads(capsys.readouterr().out)
    assert main(["diagnose", str(run), "--json"]) == 0
    diagnosed = json.loads(capsys.readouterr().out)
    assert [diagnosed[key] for key in ("verdict", "cause", "culprits", "confidence")] == [
        watched[key] or "" for key in ("verdict", "cause", "culprits", "confidence")
    ]
    assert diagnosed["sentences"] == watched["sentences"]


def test_a_folder_that_is_named_like_a_run_is_read_as_any_other(tmp_path, capsys):
    (tmp_path / "events").mkdir()
    (tmp_path / "a.log").write_text("[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n")
    assert main(["diagnose", str(tmp_path)]) == 0
    assert "out of memory" in capsys.readouterr().out
