"""``run SCENARIO``: run variants of a scenario, or of all scenarios, and print their verdicts."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs
from rich.console import Console

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine.startup.refusal import check_start
from repro.commands.shared import lab
from repro.commands.shared.verdicts import exit_code, print_verdicts, write_reports
from repro.exit_codes import INTERRUPTED
from repro.lab import flags, scenarios
from repro.lab.rank.environment import refuse_bad_variables
from repro.lab.settings import RunSettings
from repro.lab.start import job, launch
from repro.lab.start.machine import CannotRunHere, require_gpus, require_model
from repro.lab.start.memory import refuse_too_large, refuse_too_many
from repro.lab.start.series import Series
from repro.report.junit import write_junit
from repro.report.terminal import Display, display, say
from repro.store.description import VARIANTS
from repro.watch.document import Document


@dataclass(frozen=True)
class Planned:
    """One run that the user requested: one variant of one scenario.

    unsafe    reasons why the run can hang; the run is started nevertheless. () if there is no such reason
    refused   with `run all`: why this scenario cannot run with the user's flags; "" if it can
    """

    settings: RunSettings
    unsafe: tuple[str, ...] = ()
    refused: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scenario", metavar="SCENARIO", help='the name of a scenario, or "all"')
    parser.add_argument("--variant", choices=(*VARIANTS, "all"), default="fault", help="default: fault")
    flags.add_flags(parser, *(flag.field for flag in flags.FLAGS))
    parser.add_argument("--strict", dest="checks", action="store_const", const="strict", help="same as --checks strict")
    lab.add_arguments(parser, launcher_help="torchrun for one run, fork for several")


def run(args: argparse.Namespace) -> int:
    """Run the requested runs one after another, print their verdicts, and write their reports.

    Returns the exit code for all verdicts together, or INTERRUPTED after Ctrl-C.
    """
    refuse_bad_variables()
    planned = plan(args)
    lab.refuse_junit(args)
    able = [one.settings for one in planned if not one.refused]
    refuse_too_many(able)
    if args.config:  # only settings from --config can be wrong; the default sizes always fit
        refuse_too_large(able)
    if able[0].backend == "nccl":
        require_gpus(able[0].num_ranks)
    session = Session(args, Console(stderr=args.json))
    # torchrun starts ranks in the same way as real servers do. The fork server imports torch only once for all runs.
    launcher = args.launcher or ("fork" if len(planned) > 1 else "torchrun")
    # The user can interrupt at any point; then the verdicts so far are shown.
    with contextlib.suppress(KeyboardInterrupt), job.launcher(launcher) as start:
        series = Series(args.out, start, args.interrupt)
        for number, one in enumerate(planned, start=1):
            session.run(one, series, f"[{number}/{len(planned)}] " if args.scenario == "all" else "")
            if args.interrupt():
                break
    session.write_reports()
    if args.junit:
        write_junit(args.junit, session.documents)
    print_verdicts(session.console, session.documents, args.json)
    return INTERRUPTED if args.interrupt() else exit_code(session.documents)


def plan(args: argparse.Namespace) -> list[Planned]:
    """Check the settings of all requested runs, and return the runs.

    A scenario of `run all` that cannot run with these flags is returned with the reason in ``refused``. Raises
    ConfigError if no requested scenario can run.
    """
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
    """Return the settings of one run, from the command line and --config. Raises ConfigError or DamagedFile."""
    return flags.settings_of(scenario, variant, flags.given(args), args.config)


def _preflight(settings: RunSettings) -> list[str]:
    """Return the reasons why a run can hang; [] if there is none.

    Only a `fault` run and a run with --allow-unsafe are allowed to hang. If any other run can hang, raises Refused with
    the first reason.

    Raises CannotRunHere if torch is not installed: the check uses the run's policies, and some policies need torch.
    """
    require_model()
    scenario = scenarios.load(settings.scenario)
    return check_start(scenario.server(settings, 0), scenario.policies(settings, 0))


@dataclass
class Session:
    """Does the requested runs of one command, prints the verdict after each run, and writes the reports.

    documents    the content of verdict.json for each run so far
    unreported   the run directories without a report so far: a report shows all variants of a scenario, so the reports
                 are written after the last variant
    """

    args: argparse.Namespace
    console: Console
    documents: list[Document] = field(default_factory=list)
    unreported: list[Path] = field(default_factory=list)
    _printed: set[str] = field(default_factory=set)

    def run(self, planned: Planned, series: Series, count: str) -> None:
        """Run one variant and add its verdict to ``documents``.

        If this machine cannot run the variant, the added document has no verdict, and has the reason in `skipped`. But
        if the command is for one scenario, and ``documents`` is empty, raises CannotRunHere with this reason.

        planned: the variant to run, or the reason why it cannot run
        series: starts the run
        count: the beginning of the progress line, such as "[3/21] "
        """
        settings = planned.settings
        num_ranks = settings.num_ranks if not planned.refused else self.args.num_ranks or settings.num_ranks
        title = f"{count}{settings.scenario} {settings.variant}: {num_ranks} ranks, seed {settings.seed}"
        if self.unreported and self.documents[-1].scenario != settings.scenario:
            self.write_reports()
        if planned.refused:
            run_dir, document = None, launch.skipped(settings, planned.refused)
        else:
            run_dir, document = series.run(settings, self._shown(planned, title))
        if run_dir is None:
            self._skip(structs.replace(document, num_ranks=num_ranks), title)
            return
        self.documents.append(document)
        self.unreported.append(run_dir.root)
        if self.args.variant != "all" or settings.variant == VARIANTS[-1] or self.args.interrupt():
            self.write_reports()
        remark = "" if document.matches_expected else ", not as expected"
        say(self.console, f"  {document.verdict}{remark}: {run_dir.root / 'report.html'}")

    @contextlib.contextmanager
    def _shown(self, planned: Planned, title: str) -> Iterator[Display]:
        """Yield a progress display. If the run can hang, first print the reason, once for all runs with this reason.

        title: the text above the live table, or a line that is printed if there is no terminal
        """
        for finding in {*planned.unsafe[:1]} - self._printed:
            say(self.console, f"unsafe: {finding}")
            self._printed.add(finding)
        with display(self.console, title) as shown:
            yield shown

    def _skip(self, document: Document, title: str) -> None:
        """Add the document of a run that is not possible here to ``documents``, and print the reason.

        document: a verdict.json without a verdict, with the reason in `skipped`
        title: the beginning of the printed line

        If the command is for one scenario, and ``documents`` is empty, raises CannotRunHere with this reason instead.
        """
        if self.args.scenario != "all" and not self.documents:
            raise CannotRunHere(f"{document.scenario}: {document.skipped}")
        self.documents.append(document)
        say(self.console, f"{title}: {document.skipped}")

    def write_reports(self) -> None:
        """Write the reports of all runs that have none yet."""
        if self.unreported:
            write_reports(self.console, self.unreported)
            self.unreported = []
