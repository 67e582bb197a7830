"""Runs of a scenario on forked ranks: the worker, the watcher and the files of a real run, without torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from written import written

from repro.hosts.host import Host
from repro.hosts.processes import starved_seconds
from repro.lab.outcome import reference
from repro.lab.rank.worker import run_rank
from repro.lab.settings import RunSettings
from repro.lab.start import launch
from repro.lab.start.prepare import prepare_run_dir
from repro.report.terminal import Display
from repro.store.run_dir import RunDir, write_json

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@functools.lru_cache(maxsize=64)
def reference_tokens(settings: RunSettings) -> dict[str, list[int]]:
    """Return the tokens of the single-process reference. The variants of a scenario share them."""
    return reference.compute(settings)


def run_forked(
    settings: RunSettings,
    out: Path,
    *,
    with_reference: bool = True,
    before: Callable[[RunDir], object] = lambda run_dir: None,
    in_rank: Callable[[int], None] = lambda rank: None,
    during: Callable[[RunDir, list[int]], None] = lambda run_dir, pids: None,
    notice: Callable[[str], None] = lambda text: None,
) -> tuple[RunDir, dict[str, Any]]:
    """Run one variant. in_rank runs in each rank before it starts; during runs in this process once all ranks are
    forked.
    """
    run_dir = prepare_run_dir(out, settings)
    before(run_dir)
    write_json(run_dir.reference, reference_tokens(_shared(settings)) if with_reference else {})
    pids = [_fork(run_dir, settings, rank, in_rank) for rank in range(settings.num_ranks)]
    lost_s = _lost_seconds()
    try:
        during(run_dir, pids)
        document = launch.attend(
            run_dir, settings, lambda: False, Display(notice=notice), lambda: any(map(_running, pids))
        )
    finally:
        for pid in pids:
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        _LOST_S[run_dir.root] = max(0.0, _lost_seconds() - lost_s)  # the time of a thread that ended is gone
    return run_dir, written(document)


_LOST_S: dict[Path, float] = {}
"""Root of each run -> for how many seconds this process, which watched the run, lacked a processor."""


def _lost_seconds() -> float:
    return starved_seconds(os.getpid()) + Host().stolen_seconds()


def in_time(run_dir: RunDir, document: dict[str, Any], limit_s: float, settings: RunSettings) -> bool:
    """Whether the verdict came within ``limit_s`` after the last event.

    Time in which the watcher or the ranks lacked a processor is added.
    """
    starved = max(document["system"]["starved"].values(), default=0.0)
    patience_s = 10 * settings.quiet_window_s if starved > 0.1 else 0.0
    return bool(document["seconds"]["stall_to_verdict"] <= limit_s + patience_s + _LOST_S[run_dir.root])


def _shared(settings: RunSettings) -> RunSettings:
    return dataclasses.replace(settings, scenario="any", variant="control", checks="", quiet_window_s=1, deadline_s=1)


def _fork(run_dir: RunDir, settings: RunSettings, rank: int, in_rank: Callable[[int], None]) -> int:
    if pid := os.fork():
        return pid
    sys.stdout = sys.stderr = log = run_dir.log(rank).open("w")  # replaces pytest's own files
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        in_rank(rank)
        run_rank(run_dir, settings, rank, lambda: dist.FileStore(str(run_dir.store), settings.num_ranks))
    finally:
        os._exit(0)


def _running(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False
