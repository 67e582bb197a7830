"""``python -m repro run SCENARIO``: run variants of a scenario, or of all scenarios, and print their verdicts."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_moe_ref.config import GDN_PREFILL_BACKENDS, MOE_BACKENDS, ConfigError
from hybrid_moe_ref.engine.server_config import CHECKS
from hybrid_moe_ref.engine.startup.refusal import check_start
from repro.commands import INTERRUPTED, exit_code, print_verdicts, read_config, refuse_junit, write_reports
from repro.hosts.interrupt import Interrupt
from repro.lab import scenarios
from repro.lab.settings import KERNEL_CACHES, RunSettings
from repro.lab.start import job, kernel_cache, launch
from repro.lab.start.launch import CannotRunHere
from repro.lab.start.memory import refuse_too_large, refuse_too_many
from repro.report.junit import write_junit
from repro.report.terminal import display, say
from repro.store.description import VARIANTS


@dataclass(frozen=True)
class Planned:
    """One requested run.

    unsafe    the reasons why the run may hang; not empty only for a run that may start nevertheless
    refused   why one scenario of `run all` cannot run with these flags; "" if it can
    """

    settings: RunSettings
    unsafe: tuple[str, ...] = ()
    refused: str = ""


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser("run", help="run a scenario and print its verdict")
    parser.add_argument("scenario", metavar="SCENARIO", help='the name of a scenario, or "all"')
    parser.add_argument("--variant", choices=(*VARIANTS, "all"), default="fault", help="default: fault")
    parser.add_argument("--ranks", type=int, dest="num_ranks", metavar="N", help="default: 8")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: gloo")
    parser.add_argument("--quiet-window", type=float, dest="quiet_window_s", metavar="S", help="default: 1")
    parser.add_argument("--deadline", type=float, dest="deadline_s", metavar="S", help="default: 120")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")
    parser.add_argument("--checks", choices=CHECKS, help="default: observe for fault, agree for control and fix")
    parser.add_argument("--strict", dest="checks", action="store_const", const="strict", help="as --checks strict")
    parser.add_argument("--allow-unsafe", action="store_true", help="start even if it could hang (always so for fault)")
    _add_server_flags(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with the keys of a run's config.json")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument("--launcher", choices=job.LAUNCHERS, help="default: torchrun, or fork for all")
    parser.add_argument("--json", action="store_true", help="print the verdicts as a JSON list")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")
    parser.set_defaults(command=run, parser=parser)


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gdn-prefill-backend", choices=GDN_PREFILL_BACKENDS, help="jit: compiled on this machine")
    parser.add_argument("--moe-backend", choices=MOE_BACKENDS, help="the same for the experts")
    meaning = "compiled kernels at the start; split: every rank has its own cache, and only rank 0's is cold"
    parser.add_argument("--kernel-cache", choices=KERNEL_CACHES, help=meaning)
    parser.add_argument(
        "--group-timeout",
        type=float,
        dest="group_timeout_s",
        metavar="S",
        help="when a collective gives up",
    )


def run(args: argparse.Namespace) -> int:
    """Run the requested runs one after another; return the exit code of all verdicts."""
    planned = plan(args)
    refuse_junit(args)
    able = [one.settings for one in planned if not one.refused]
    refuse_too_many(able)
    if args.config:  # the default sizes always fit
        refuse_too_large(able)
    if able[0].backend == "nccl":
        _require_gpus(able[0].num_ranks)
    session = Session(args, Console(stderr=args.json), args.interrupt)
    launcher = args.launcher or ("fork" if args.scenario == "all" else "torchrun")
    # The user may interrupt at any point; the verdicts so far are then shown.
    with contextlib.suppress(KeyboardInterrupt), job.launcher(launcher) as start:
        for number, one in enumerate(planned, start=1):
            session.run(one, start, f"[{number}/{len(planned)}] " if args.scenario == "all" else "")
            if args.interrupt():
                break
    session.write_reports()
    if args.junit:
        write_junit(args.junit, session.documents)
    print_verdicts(session.console, session.documents, args.json)
    return INTERRUPTED if args.interrupt() else exit_code(session.documents)


def plan(args: argparse.Namespace) -> list[Planned]:
    """The requested runs, checked. Raises ConfigError if no scenario can run with these flags."""
    variants = VARIANTS if args.variant == "all" else (args.variant,)
    planned: list[Planned] = []
    errors: list[ConfigError] = []
    for name in scenarios.names() if args.scenario == "all" else [args.scenario]:
        try:
            runs = [settings_of(args, name, variant) for variant in variants]
            planned += [Planned(settings, tuple(_preflight(settings))) for settings in runs]
        except ConfigError as error:
            errors.append(error)
            usual = [scenarios.settings_of({"scenario": name, "variant": variant}) for variant in variants]
            planned += [Planned(settings, refused=str(error)) for settings in usual]
    if errors and all(one.refused for one in planned):
        raise errors[0]
    return planned


def settings_of(args: argparse.Namespace, scenario: str, variant: str) -> RunSettings:
    """The settings of one run, from the command line and --config. Raises ConfigError."""
    document = read_config(args.config)
    flags = {
        name: value
        for name in (
            "num_ranks", "backend", "quiet_window_s", "deadline_s", "seed", "checks", "kernel_cache", "group_timeout_s"
        )
        if (value := getattr(args, name, None)) is not None
    }  # fmt: skip
    engine = {
        name: value
        for name in ("gdn_prefill_backend", "moe_backend")
        if (value := getattr(args, name, None)) is not None
    }
    if args.allow_unsafe:
        flags["allow_unsafe"] = True
    if engine and isinstance(users_engine := document.get("engine", {}), dict):
        document = {**document, "engine": {**users_engine, **engine}}
    where = str(args.config) if args.config else ""
    return scenarios.settings_of({**flags, "scenario": scenario, "variant": variant}, document, where)


def _preflight(settings: RunSettings) -> list[str]:
    """The reasons why the run may hang. Raises Refused if there are any and the run is not allowed to start."""
    scenario = scenarios.load(settings.scenario)
    return check_start(scenario.server(settings, 0), scenario.policies(settings, 0))


def _require_gpus(num_ranks: int) -> None:
    """Raise CannotRunHere without a GPU for each rank. A child process counts them: this one never loads torch."""
    ask = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    count = int(answer.stdout.strip() or 0) if answer.returncode == 0 else 0
    if count < num_ranks:
        raise CannotRunHere(f"--backend nccl needs a GPU for each of {num_ranks} ranks; {count} found")


@dataclass
class Session:
    """The runs of one command, their verdicts, and what later runs reuse.

    unreported   run directories whose report is not written yet: a report shows all variants, so it waits for them
    """

    args: argparse.Namespace
    console: Console
    interrupt: Interrupt
    documents: list[dict[str, Any]] = field(default_factory=list)
    unreported: list[Path] = field(default_factory=list)
    _references: dict[tuple[Any, ...], Path] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def run(self, planned: Planned, start: job.Start, count: str) -> None:
        """Run one variant and add its verdict to ``documents``. Raises CannotRunHere if it is the only scenario."""
        settings = planned.settings
        num_ranks = settings.num_ranks if not planned.refused else self.args.num_ranks or settings.num_ranks
        title = f"{count}{settings.scenario} {settings.variant}: {num_ranks} ranks, seed {settings.seed}"
        if self.unreported and self.documents[-1]["scenario"] != settings.scenario:
            self.write_reports()
        missing = planned.refused or scenarios.load(settings.scenario).missing(settings)
        if not missing:
            for finding in {*planned.unsafe[:1]} - self._said:
                say(self.console, f"unsafe: {finding}")
                self._said.add(finding)
            reference = self._references.get(settings.reference_key())
            try:
                with display(self.console, title) as shown:
                    run_dir, document = launch.run(settings, self.args.out, self.interrupt, shown, start, reference)
            except kernel_cache.CannotFill as error:
                missing = str(error)
        if missing:
            if self.args.scenario != "all" and not self.documents:
                raise CannotRunHere(f"{settings.scenario}: {missing}")
            self.documents.append({**launch.skipped(settings, missing), "num_ranks": num_ranks})
            say(self.console, f"{title}: {missing}")
            return
        self.documents.append(document)
        self._references.setdefault(settings.reference_key(), run_dir.reference)
        self.unreported.append(run_dir.root)
        if self.args.variant != "all" or settings.variant == VARIANTS[-1] or self.interrupt():
            self.write_reports()
        remark = "" if document["matches_expected"] else ", not as expected"
        say(self.console, f"  {document['verdict']}{remark}: {run_dir.root / 'report.html'}")

    def write_reports(self) -> None:
        """Write the reports that are not written yet."""
        if self.unreported:
            write_reports(self.console, self.unreported)
            self.unreported = []
