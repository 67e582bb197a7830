"""``watch RUN|ZIP``: print the verdict on a run (also while the run is going on) or on a bundle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from hybrid_moe_ref.config import ConfigError
from repro import bundle
from repro.attach import recording
from repro.commands import diagnose
from repro.commands.shared.verdicts import exit_code, print_verdicts, write_reports
from repro.exit_codes import CANNOT_TELL, EXPECTED, INTERRUPTED, UNEXPECTED
from repro.hosts import processes
from repro.hosts.agent import HostAgent
from repro.hosts.interrupt import Interrupt
from repro.ingest import saved
from repro.lab.outcome.expectation import watch_options
from repro.lab.outcome.second_judgement import judge_again
from repro.lab.settings import RunSettings, read_settings
from repro.lab.start import launch
from repro.report.terminal import Display, outcome, say, waits
from repro.store.run_dir import RunDir
from repro.store.schema import to_json
from repro.store.text import escape_lines
from repro.trace.witness.file import Tail
from repro.verdict import partial
from repro.verdict.classes import class_of, describe_classes
from repro.watch.document import Document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"The verdicts:\n{describe_classes()}"
    parser.add_argument("dir", type=Path, metavar="RUN|ZIP", help="a run directory or a bundle")
    parser.add_argument(
        "--end", action="store_true", help="watch until the verdict, write verdict.json, then end the run"
    )
    agent = "run the agent of this host for a watcher on another host; RANK is the first rank of this host"
    parser.add_argument("--agent", "--lookout", type=int, metavar="RANK", help=agent)
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def run(args: argparse.Namespace) -> int:
    with bundle.opened(args.dir) as root:
        return _watch_run(args, RunDir(root))


def _watch_run(args: argparse.Namespace, run_dir: RunDir) -> int:
    if saved.is_saved(run_dir.root):
        if args.end or args.agent is not None:
            raise ConfigError(
                "this folder of a diagnosis has no ranks to watch: use `diagnose` or `report`",
                "--end" if args.end else "--agent",
            )
        evidence = saved.load(run_dir.root)
        return diagnose.say(partial.diagnose(evidence.records), evidence, args.json)
    if recording.is_recording(run_dir) and not args.end and args.agent is None:
        document, whole = recording.judge_again(run_dir)
        _print(document, args.json)
        return EXPECTED if class_of(document.verdict).decided and whole else CANNOT_TELL
    try:
        settings = read_settings(run_dir.config)
    except OSError as error:
        raise ConfigError(f"not a run directory: {error.strerror}", str(run_dir.config)) from error
    console = Console(stderr=args.json)
    if (args.end or args.agent is not None) and run_dir.verdict.exists():
        option = "--end" if args.end else "--agent"
        raise ConfigError(f"the run already has a verdict: leave out {option} to judge it again", str(run_dir.verdict))
    if args.agent is not None:
        if args.end or not 0 <= args.agent < settings.num_ranks:
            ranks = f"{args.agent} is not one of the {settings.num_ranks} ranks"
            raise ConfigError("cannot be combined with --end" if args.end else ranks, "--agent")
        HostAgent(run_dir, watch_options(settings), args.agent).run()
        return EXPECTED
    if args.end:
        return _watch_to_end(run_dir, settings, console, args)
    document, whole = judge_again(run_dir, settings)
    _print(document, args.json)
    if not class_of(document.verdict).decided or not whole:
        return CANNOT_TELL
    return EXPECTED if document.matches_expected else UNEXPECTED


def _print(document: Document, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(document), indent=1))
        return
    for line in (outcome(document), *document.sentences, *waits(document), *document.evidence):
        print(escape_lines(line))


def _watch_to_end(run_dir: RunDir, settings: RunSettings, console: Console, args: argparse.Namespace) -> int:
    tails = [Tail(run_dir.witness(rank)) for rank in range(settings.num_ranks)]

    def job_alive() -> bool:
        identities = [tail.writer() for tail in tails]
        return any(not identity.pid or processes.find(identity) for identity in identities)

    interrupt: Interrupt = args.interrupt
    with interrupt.deferred():
        shown = Display(notice=lambda text: say(console, text))
        document = launch.attend(run_dir, settings, interrupt, shown, job_alive)
    write_reports(console, [run_dir.root])
    print_verdicts(console, [document], args.json)
    return INTERRUPTED if interrupt() else exit_code([document])
