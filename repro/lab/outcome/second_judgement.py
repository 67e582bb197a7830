"""Judge the files of a lab run again: compare the tokens with the reference, and the verdict with the expected one."""

from __future__ import annotations

import time

from repro.lab.outcome.expectation import document_of, watch_options
from repro.lab.outcome.tokens import name_equal, wrong_tokens
from repro.lab.settings import RunSettings, read_settings
from repro.store.run_dir import RunDir
from repro.watch.comparison import Comparison
from repro.watch.document import Document, Durations, Watcher, progress_of
from repro.watch.offline import judge_files


def compare_again(run_dir: RunDir) -> Comparison:
    """Compare the tokens in a run's files with those of the single-process reference.

    If a file is missing or damaged, the field ``missing`` of the result names the file.
    """
    try:
        comparison, damaged = _compare(run_dir, read_settings(run_dir.config))
    except (OSError, ValueError) as error:
        return Comparison(missing=f"the tokens cannot be compared: {run_dir.describe(error)}")
    return Comparison(missing=damaged[0]) if damaged else comparison


def _compare(run_dir: RunDir, settings: RunSettings) -> tuple[Comparison, list[str]]:
    """Compare the run's tokens with the reference. Returns the result, and a list with the error of a damaged file.

    The list is [] if no file is damaged.
    """
    try:
        wrong = wrong_tokens(run_dir, settings.num_ranks, settings.tp_size)
        return Comparison(tuple(wrong), evidence=name_equal(run_dir)), []
    except FileNotFoundError as error:
        return Comparison(missing=str(error)), []
    except (OSError, ValueError) as error:
        return Comparison(missing="a file with tokens is damaged"), [run_dir.describe(error)]


def judge_again(run_dir: RunDir, settings: RunSettings) -> tuple[Document, bool]:
    """Judge a run from its files. Returns (the content of verdict.json, whether all files could be read in full)."""
    comparison, damaged = _compare(run_dir, settings)
    again = judge_files(run_dir, watch_options(settings), comparison)
    decided = again.decided
    if decided is not None:
        seconds = decided.seconds
    else:
        passed_s = max(0.0, time.time() - run_dir.config.stat().st_mtime)
        seconds = Durations(round(again.verdict.quiet_s, 3), round(passed_s, 3))
    document = document_of(
        settings,
        again.verdict.with_evidence(damaged),
        watcher=Watcher.of(again.look),
        system=again.look.facts,
        notes=again.look.notes,
        judged=progress_of(again.look),
        interrupted=decided is not None and decided.interrupted,
        ended_by=decided.ended_by if decided else "",
        seconds=seconds,
    )
    return document, again.whole and not damaged
