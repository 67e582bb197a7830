"""Shrink a scenario while its verdict stays the same, and write the result as one file to paste into an issue.

A scenario can predict its verdict without a run. First reduce the settings as long as the predicted verdict stays the
same, then run the smallest settings. If that run has a different verdict than predicted, find the smallest settings
with the predicted verdict by a bisection with more runs. At the end, run the written file itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from repro.bundle import replay
from repro.lab import scenarios
from repro.lab.scenarios import Scenario
from repro.lab.search.reductions import reductions
from repro.lab.settings import RunSettings
from repro.lab.start.machine import CannotRunHere
from repro.lab.start.series import Series
from repro.report.gather import gather
from repro.store.run_dir import write_json
from repro.store.text import counted
from repro.watch.document import Document

BUDGET_S = 150.0
RUN_DEADLINE_S = 45.0


class AnotherVerdict(RuntimeError):
    """The run to shrink has another verdict or cause than its scenario predicts.

    verdict   the verdict of the run
    """

    def __init__(self, text: str, verdict: str) -> None:
        super().__init__(text)
        self.verdict = verdict


@dataclass
class Result:
    """The result of the search for the smallest settings whose run has the same verdict.

    before      the settings from which the search began
    after       the smallest settings with the same verdict
    steps       how many steps a rank began in the smallest run; if the ranks differ, the largest number
    runs        how many runs the search made
    seconds     how long the search took
    source      the text of the Python file that repeats the smallest run; "" until `Runner.write_replay` sets it, or if
                there can be no such file
    confirmed   what the written file printed about its hang, or why it printed nothing; "" if it was not run
    notes       what the user must know about the file
    """

    before: RunSettings
    after: RunSettings
    verdict: str
    cause: str | None
    steps: int
    runs: int
    seconds: float
    source: str = ""
    confirmed: str = ""
    notes: list[str] = field(default_factory=list)


Trial = Callable[[RunSettings], Document]


def minimise(scenario: Scenario, start: RunSettings, trial: Trial, budget_s: float = BUDGET_S) -> Result:
    """Find the smallest settings whose run has the same verdict and cause as the run of ``start``.

    trial     a function that starts a run with the settings it gets, and returns the content of verdict.json
    budget_s  seconds after which no further run starts

    Raises AnotherVerdict if the run of ``start`` itself has another verdict or cause than the scenario predicts.
    """
    began = time.monotonic()
    runs = 0

    def says(settings: RunSettings) -> tuple[str, str | None, Document]:
        nonlocal runs
        runs += 1
        document = trial(settings)
        return document.verdict, document.cause, document

    predicted = scenario.hang(start)
    path = [start, *reductions(scenario, start, predicted)]
    verdict, cause, document = says(start)
    if (verdict, cause) != (predicted.verdict, predicted.cause):
        why = (
            f"the verdict on the run is {verdict} {cause or ''}, but the scenario predicts {predicted.verdict} "
            f"{predicted.cause or ''}; the scenario was not shrunk"
        )
        raise AnotherVerdict(why, verdict)
    low, high = 0, len(path)  # path[low] has the verdict, path[high] (or the end of the path) does not
    middle = high - 1  # try the smallest settings first, because the predictions are mostly right
    while low < middle < high and time.monotonic() - began < budget_s:
        *outcome, trial_document = says(path[middle])
        if outcome == [verdict, cause]:
            low, document = middle, trial_document
        else:
            high = middle
        middle = (low + high) // 2
    path = path[: low + 1]
    steps = max((position.step for position in document.ranks), default=-1) + 1
    return Result(start, path[-1], verdict, cause, steps, runs, time.monotonic() - began)


@dataclass
class Runner:
    """Starts the runs of `minimise`. A call runs the settings to a verdict, and returns the content of verdict.json.

    A call computes no single-process reference, because a run that hangs serves no tokens that could be compared.

    series     makes the runs, all with one launcher
    say        called after each run, with a line that has its verdict
    last       the directory of the last run
    settings   the settings of the last run
    """

    series: Series
    say: Callable[[str], None]
    last: Path | None = None
    settings: RunSettings | None = None

    def __call__(self, settings: RunSettings) -> Document:
        no_reference = self.series.out / "no-reference.json"
        write_json(no_reference, {})
        return self.run(settings, no_reference)

    def run(self, settings: RunSettings, reference: Path | None = None) -> Document:
        """Run one variant. Returns the content of verdict.json.

        reference: a file to use as the single-process reference; by default a process computes the reference

        Raises CannotRunHere if this machine lacks what the run needs, and KeyboardInterrupt if the user interrupts.
        """
        run_dir, document = self.series.run(settings, reference=reference)
        if run_dir is None:
            raise CannotRunHere(f"{settings.scenario}: {document.skipped}")
        self.last, self.settings = run_dir.root, settings
        if self.series.interrupt():
            raise KeyboardInterrupt
        self.say(f"  {settings.variant}: {describe(settings)}: {document.verdict} {document.cause or ''}".rstrip())
        return document

    def write_replay(self, result: Result) -> None:
        """Set ``result.source`` to the text of a Python file that repeats the smallest run.

        To decide whether the file can also contain the fix, run the fix with the same settings. The file contains the
        fix if this run has the expected verdict.
        """
        if self.settings != result.after:  # the last trial had other settings and another verdict
            self(result.after)
        fault = self.last
        assert fault is not None
        cured = dataclasses.replace(result.after, variant="fix", checks="")
        document = self.run(cured)
        expected = scenarios.load(cured.scenario).expected(cured)
        good = (document.verdict, document.cause) == (expected.verdict, expected.cause)
        if not good:
            result.notes.append(f"at this size the run with the fix is {document.verdict}, so the file has no --fix")
        try:
            result.source = replay.of_runs(gather(fault), self.last if good else None)
        except replay.ReplayError as error:
            result.notes.append(f"no file was written: {str(error).replace(f'{self.series.out}/', '')}")


def describe(settings: RunSettings) -> str:
    """Return the sizes that `minimise` reduces, as text: "2 ranks, 1 layer (G), …"."""
    work, model = settings.workload, settings.model
    return (
        f"{settings.num_ranks} ranks, {counted(len(model.layer_pattern), 'layer')} ({model.layer_pattern}), "
        f"{model.num_experts} experts top-{model.num_experts_per_tok}, {counted(work.max_requests, 'request')} of "
        f"at most {work.max_prompt_tokens}+{work.max_new_tokens} tokens"
    )
