"""Shrink a scenario while its verdict stays the same, and write the result as one file to paste into an issue.

A scenario can predict its verdict without running. Search the predictions for the smallest settings, then confirm them
by one run. If that run has another verdict, bisect for the smallest settings that keep it. At the end, run the written
file itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import ConfigError
from repro.bundle import replay
from repro.hosts import processes
from repro.hosts.interrupt import Interrupt
from repro.lab import scenarios
from repro.lab.scenarios import Expected, Scenario
from repro.lab.settings import RunSettings
from repro.lab.start import job, launch
from repro.report.gather import gather
from repro.report.terminal import Display
from repro.store.run_dir import refuse_unwritable, write_atomically, write_json
from repro.store.text import counted, escape_lines

BUDGET_S = 150.0
RUN_DEADLINE_S = 45.0
CHECK_DEADLINE_S = 90.0


class AnotherVerdict(RuntimeError):
    """The run to shrink does not have the verdict that its scenario predicts; ``verdict`` is the one that it has."""

    def __init__(self, text: str, verdict: str) -> None:
        super().__init__(text)
        self.verdict = verdict


@dataclass
class Result:
    """The result of a search.

    steps       how many steps a rank begins before it is stuck
    confirmed   what the written file printed when it was run
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


Trial = Callable[[RunSettings], dict[str, Any]]


def minimise(scenario: Scenario, start: RunSettings, trial: Trial, budget_s: float = BUDGET_S) -> Result:
    """Find the smallest settings whose run has the same verdict and cause as the run of ``start``.

    Raises AnotherVerdict when the run of ``start`` itself does not have the verdict that the scenario predicts.
    """
    began = time.monotonic()
    runs = 0

    def says(settings: RunSettings) -> tuple[str, str | None, dict[str, Any]]:
        nonlocal runs
        runs += 1
        document = trial(settings)
        return document["verdict"], document["cause"], document

    predicted = scenario.hang(start)
    path = [start, *_reductions(scenario, start, predicted)]
    verdict, cause, document = says(start)
    if (verdict, cause) != (predicted.verdict, predicted.cause):
        why = f"the run says {verdict} {cause or ''}, not {predicted.verdict} {predicted.cause or ''}: not shrunk"
        raise AnotherVerdict(why, verdict)
    low, high = 0, len(path)  # path[low] has the verdict, path[high] (or the end of the path) does not
    middle = high - 1  # the smallest settings first: the predictions are mostly right
    while low < middle < high and time.monotonic() - began < budget_s:
        *outcome, trial_document = says(path[middle])
        if outcome == [verdict, cause]:
            low, document = middle, trial_document
        else:
            high = middle
        middle = (low + high) // 2
    path = path[: low + 1]
    steps = max((position["step"] for position in document["ranks"]), default=-1) + 1
    return Result(start, path[-1], verdict, cause, steps, runs, time.monotonic() - began)


def _reductions(scenario: Scenario, start: RunSettings, target: Expected) -> Iterator[RunSettings]:
    """Ever smaller settings for which the scenario predicts the verdict ``target``; each step shrinks one setting."""
    current, moved = start, True
    while moved:
        moved = False
        for smaller in (_ranks, _layers, _experts, _tokens, _requests):
            for candidate in smaller(current):
                if _predicts(scenario, candidate, target):
                    current, moved = candidate, True
                    yield current
                    break


def _predicts(scenario: Scenario, settings: RunSettings, target: Expected) -> bool:
    try:
        predicted = scenario.hang(settings)
        usable = not scenario.missing(settings)
    except (ConfigError, ValueError, ArithmeticError, LookupError):
        return False  # the scenario does not exist at this size
    same = (predicted.verdict, predicted.cause) == (target.verdict, target.cause)
    return usable and same and bool(predicted.culprits) == bool(target.culprits)


def _change(settings: RunSettings, part: str = "", **changes: Any) -> Iterator[RunSettings]:
    """Yield the settings with these changes, or nothing if they are invalid or change nothing."""
    try:
        inside: Any = dataclasses.replace(getattr(settings, part), **changes) if part else None
        changed = dataclasses.replace(settings, **({part: inside} if part else changes))
        changed.server()
        changed.requests()
    except (ConfigError, ValueError):
        return
    if changed != settings:
        yield changed


def _ranks(settings: RunSettings) -> Iterator[RunSettings]:
    for num_ranks in range(2, settings.num_ranks):
        yield from _change(settings, num_ranks=num_ranks)


def _layers(settings: RunSettings) -> Iterator[RunSettings]:
    """Shorter layer patterns first: every subsequence of up to 3 layers, then the prefix of each greater length."""
    pattern = settings.model.layer_pattern
    tried: set[str] = set()
    for length in range(1, len(pattern)):
        for places in combinations(range(len(pattern)), length) if length <= 3 else [range(length)]:
            kept = "".join(pattern[place] for place in places)
            if kept not in tried:
                tried.add(kept)
                yield from _change(settings, "model", layer_pattern=kept)


def _experts(settings: RunSettings) -> Iterator[RunSettings]:
    for top_k in sorted({1, 2, settings.model.num_experts_per_tok}):
        for num_experts in range(settings.num_ranks, settings.model.num_experts, settings.num_ranks):
            if num_experts >= top_k and top_k <= settings.model.num_experts_per_tok:
                yield from _change(settings, "model", num_experts=num_experts, num_experts_per_tok=top_k)
                break


def _tokens(settings: RunSettings) -> Iterator[RunSettings]:
    """Fewer prompt tokens and new tokens, which decide the number of steps."""
    work = settings.workload
    for prompt in sorted({1, 2, 4, work.max_prompt_tokens}):
        for short in sorted({1, 2, work.short_new_tokens}):
            for new in sorted({short + 1, short + 3, work.max_new_tokens}):
                size = (prompt, short, new)
                now = (work.max_prompt_tokens, work.short_new_tokens, work.max_new_tokens)
                if all(a <= b for a, b in zip(size, now, strict=True)) and size != now:
                    yield from _change(
                        settings, "workload", max_prompt_tokens=prompt, short_new_tokens=short, max_new_tokens=new
                    )


def _requests(settings: RunSettings) -> Iterator[RunSettings]:
    work = settings.workload
    if (work.max_requests, work.max_arrival_step) != (1, 0):
        yield from _change(settings, "workload", max_requests=1, max_arrival_step=0)
    for count in range(1, work.max_requests):
        yield from _change(settings, "workload", max_requests=count)
    if work.max_idle_ranks > 1:
        yield from _change(settings, "workload", max_idle_ranks=1)


# -- real runs ---------------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """Runs trials in a temporary folder, without a single-process reference, which a hang does not need."""

    folder: Path
    interrupt: Interrupt
    start: job.Start
    say: Callable[[str], None]
    last: Path | None = None
    settings: RunSettings | None = None

    def __call__(self, settings: RunSettings) -> dict[str, Any]:
        none = self.folder / "no-reference.json"
        write_json(none, {})
        return self.run(settings, none)

    def run(self, settings: RunSettings, reference: Path | None = None) -> dict[str, Any]:
        """Run one variant; return its verdict. Raises KeyboardInterrupt when the user interrupts."""
        run_dir, document = launch.run(settings, self.folder, self.interrupt, Display(), self.start, reference)
        self.last, self.settings = run_dir.root, settings
        if self.interrupt():
            raise KeyboardInterrupt
        self.say(
            f"  {settings.variant}: {describe(settings)}: {document['verdict']} {document['cause'] or ''}".rstrip()
        )
        return document


def describe(settings: RunSettings) -> str:
    """The sizes that the search shrinks, as a phrase."""
    work, model = settings.workload, settings.model
    return (
        f"{settings.num_ranks} ranks, {counted(len(model.layer_pattern), 'layer')} ({model.layer_pattern}), "
        f"{model.num_experts} experts top-{model.num_experts_per_tok}, {counted(work.max_requests, 'request')} of "
        f"at most {work.max_prompt_tokens}+{work.max_new_tokens} tokens"
    )


def confirm(path: Path, num_ranks: int) -> str:
    """Run the written file as a maintainer would; return what it prints about the hang, or why there was none."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    code, output = run_within([*torchrun, str(path)], CHECK_DEADLINE_S)
    if code is None:
        return f"did not end within {CHECK_DEADLINE_S:g} s"
    lines = [line.strip() for line in output.splitlines() if line.startswith(("HANG", "  ranks"))]
    return "; ".join(lines) if code == 1 and lines else f"exit code {code} and no hang"


def run_within(command: list[str], limit_s: float) -> tuple[int | None, str]:
    """Run a program; return its exit code (None if it did not end in time) and its standard output.

    Its descendants are killed when it ends, and when the user interrupts.
    """
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with job:
        try:
            output, _ = job.communicate(timeout=limit_s)
            return job.returncode, output
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            processes.kill(processes.with_descendants(job.pid))


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser("minimise", help="shrink a scenario, and write what is left as one file")
    parser.add_argument("scenario", metavar="SCENARIO")
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: SCENARIO_minimal.py")
    parser.add_argument("--ranks", type=int, dest="num_ranks", metavar="N", help="where to start from; default: 8")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help=f"default: {BUDGET_S:g}")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Shrink the scenario and write the file; return the exit code.

    0: done. 1: the scenario's first run has another verdict than predicted. 125: that run is inconclusive, the result
    cannot be written as one file, or the written file did not hang.
    """
    flags = {name: value for name in ("num_ranks", "seed") if (value := getattr(args, name)) is not None}
    start = scenarios.settings_of(
        {**flags, "scenario": args.scenario, "variant": "fault", "deadline_s": RUN_DEADLINE_S, "checks": "observe"}
    )
    path = args.to or Path(f"{args.scenario}_minimal.py")
    refuse_unwritable(path, "; choose another --to")
    where = sys.stderr if args.json else sys.stdout

    def say(text: str) -> None:
        print(escape_lines(text), file=where, flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="repro-minimise-") as folder,
        job.launcher("fork") as start_ranks,
    ):
        runner = Runner(Path(folder), args.interrupt, start_ranks, say)
        scenario = scenarios.load(args.scenario)
        say(f"{args.scenario}: from {describe(start)}")
        try:
            result = minimise(scenario, start, runner, args.budget)
        except AnotherVerdict as error:
            print(f"repro: {args.scenario}: {escape_lines(str(error))}", file=sys.stderr)
            return 125 if error.verdict == "inconclusive" else 1
        if runner.settings != result.after:  # the last trial had another verdict
            runner(result.after)
        fault = runner.last
        cured = dataclasses.replace(result.after, variant="fix", checks="")
        document = runner.run(cured)
        expected = scenario.expected(cured)
        good = (document["verdict"], document["cause"]) == (expected.verdict, expected.cause)
        if not good:
            result.notes.append(f"the fix at this size says {document['verdict']}, so --fix is left out")
        assert fault is not None
        try:
            result.source = replay.of_runs(gather(fault), runner.last if good else None)
        except replay.ReplayError as error:
            result.notes.append(f"no file: {str(error).replace(f'{folder}/', '')}")
    if result.source:
        write_atomically(path, result.source)
        write_json(path.with_suffix(".json"), result.after.to_mapping())
        result.confirmed = confirm(path, result.after.num_ranks)
    _print_result(result, path, args.json)
    return 0 if result.confirmed.startswith("HANG") else 125


def _print_result(result: Result, path: Path, as_json: bool) -> None:
    lines = result.source.count("\n")
    if as_json:
        summary = {
            "verdict": result.verdict, "cause": result.cause, "settings": result.after.to_mapping(),
            "steps": result.steps, "runs": result.runs, "seconds": round(result.seconds, 1), "lines": lines,
            "file": str(path) if result.source else None, "confirmed": result.confirmed, "notes": result.notes,
        }  # fmt: skip
        print(json.dumps(summary, indent=1))
        return
    print(f"{result.verdict} {result.cause or ''} with {describe(result.after)}, {counted(result.steps, 'step')}")
    print(f"{counted(result.runs, 'run')} in {result.seconds:.0f} s")
    for note in result.notes:
        print(escape_lines(note))
    if result.source:
        print(f"{path}: {lines} lines; run with torchrun it said: {escape_lines(result.confirmed)}")
