"""Run several variants one after another, all with the same launcher.

Runs with the same requests and model also share the single-process reference, so that it is computed only once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repro.hosts.interrupt import Interrupt
from repro.lab import scenarios
from repro.lab.settings import RunSettings
from repro.lab.start import launch
from repro.lab.start.job import Start
from repro.lab.start.kernel_cache import CannotFill
from repro.report.terminal import Display
from repro.store.run_dir import OutputError, RunDir
from repro.watch.document import Document


@dataclass
class Series:
    """Runs the variants of one command, one after another.

    out        the folder for the run directories
    start      starts the ranks; from :func:`repro.lab.start.job.launcher`
    interrupt  returns whether the user has interrupted
    """

    out: Path
    start: Start
    interrupt: Interrupt
    _references: dict[tuple[Any, ...], Path] = field(default_factory=dict)
    _num_ended: int = 0

    def run(
        self,
        settings: RunSettings,
        shown: AbstractContextManager[Display] | None = None,
        reference: Path | None = None,
    ) -> tuple[RunDir | None, Document]:
        """Run one variant. Returns (run directory, content of verdict.json).

        shown      a context manager that shows the run's progress; it is entered only if the run is possible
        reference  a file to use as the single-process reference; by default a process computes the reference

        If this machine cannot run the variant, returns (None, document); ``document.skipped`` gives the reason.

        If the run cannot write its files, the result depends on the earlier runs of the series. If one of them has
        ended, returns (None, document) as above, so that the verdicts of the earlier runs are not lost. Otherwise
        raises OutputError or OSError.
        """
        missing = scenarios.load(settings.scenario).missing(settings)
        if not missing:
            known = reference or self._references.get(settings.reference_key())
            try:
                with shown or nullcontext(Display()) as display:
                    run_dir, document = launch.run(settings, self.out, self.interrupt, display, self.start, known)
            except CannotFill as error:
                missing = str(error)
            except (OutputError, OSError) as error:  # a full disk must not cost the earlier runs their table
                if not self._num_ended:
                    raise
                missing = str(error) if isinstance(error, OutputError) else f"{error.filename}: {error.strerror}"
            else:
                self._num_ended += 1
                if reference is None:  # other runs must not use a substitute for the reference
                    self._references.setdefault(settings.reference_key(), run_dir.reference)
                return run_dir, document
        return None, launch.skipped(settings, missing)
