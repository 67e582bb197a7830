"""Create the directory of a run, with all files that the ranks need at their start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from repro.lab import scenarios
from repro.lab.description import describe
from repro.lab.settings import RunSettings
from repro.lab.start import kernel_cache
from repro.store.run_dir import OutputError, RunDir, write_json
from repro.trace.witness.file import create
from repro.trace.witness.format import Geometry, Identity

FREE_BYTES = 32 << 20
"""Free disk space in bytes that a run needs besides its witnesses, for logs, stacks, dumps and the verdict."""


def prepare_run_dir(out: Path, settings: RunSettings, interrupt: Callable[[], bool] = lambda: False) -> RunDir:
    """Create the run directory with run.json, config.json, the kernel cache, and a witness for each rank.

    The disk blocks of the witnesses are allocated now. So a rank does not end if the disk becomes full later.

    interrupt: returns whether the user has interrupted

    Raises OutputError if ``out`` cannot be written or the disk lacks space, CannotFill from :func:`kernel_cache.fill`,
    and KeyboardInterrupt if the user interrupts. After an error the run directory is removed.
    """
    run_dir = RunDir.create(out, settings.scenario, settings.variant, settings.seed)
    try:
        shape = Geometry(ring_records=settings.ring_records)
        if shutil.disk_usage(run_dir.root).free < FREE_BYTES + settings.num_ranks * shape.file_bytes:
            raise OSError(None, "no space left on device")
        write_json(run_dir.description, describe(settings).to_mapping())
        write_json(run_dir.config, settings.to_mapping())
        kernel_cache.fill(run_dir, settings, interrupt)
        scenarios.load(settings.scenario).before(settings, kernel_cache.folder(run_dir, settings))
        for rank in range(settings.num_ranks):
            if interrupt():
                raise KeyboardInterrupt
            create(run_dir.witness(rank), Identity(rank, settings.num_ranks, run_id=run_dir.root.name), shape)
        run_dir.point_latest()
    except BaseException as error:
        shutil.rmtree(run_dir.root, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    return run_dir
