"""The command line. Exit codes: 0 the verdict is the expected one, 1 another verdict, 2 usage or configuration
error, 125 inconclusive or cannot run here, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_moe_ref.config import GDN_PREFILL_BACKENDS, MOE_BACKENDS, ConfigError, nearest
from hybrid_moe_ref.engine.refusal import preflight
from hybrid_moe_ref.engine.server_config import CHECKS
from repro import bundle, kernel_cache, launch, matrix, minimise, process, report, scenarios
from repro.configurations import CONFIGURATIONS
from repro.display import display, overview, say, summary
from repro.expectation import watch_options
from repro.junit import write_junit
from repro.launch import CannotRunHere
from repro.lookout import Lookout
from repro.memory import refuse_too_large
from repro.rejudge import judge_again
from repro.report import command as report_command
from repro.report.text import visible_lines
from repro.rundir import RUN_NAME, OutputError, RunDir, read_json, refuse_unwritable
from repro.settings import KERNEL_CACHES, VARIANTS, RunSettings, read_settings
from repro.witness import Tail, read_dir

EXPECTED, UNEXPECTED, USAGE, CANNOT_TELL, INTERRUPTED = 0, 1, 2, launch.CANNOT_TELL, 130


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> Any:
        print(f"{self.prog}: {visible_lines(message)}", file=sys.stderr)
        sys.exit(USAGE)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        hint = nearest(unknown[0], args.parser._option_string_actions)
        args.parser.error(f"unknown argument {unknown[0]}{hint}")
    try:
        code: int = args.command(args)
        sys.stdout.flush()
        return code
    except (ConfigError, OutputError, ValueError) as error:
        print(f"repro: {visible_lines(str(error))}", file=sys.stderr)
        return USAGE
    except (CannotRunHere, bundle.LeakError) as error:
        print(f"repro: {visible_lines(str(error))}", file=sys.stderr)
        return CANNOT_TELL
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read the output has left
        return EXPECTED
    except OSError as error:  # a disk that filled up during the run, for one
        place = error.filename or ("standard output" if _output_is_stuck() else "this machine")
        print(f"repro: {place}: {error.strerror or error}", file=sys.stderr)
        return CANNOT_TELL
    except KeyboardInterrupt:
        return INTERRUPTED


def _output_is_stuck() -> bool:
    """Whether standard output takes nothing, not even a line's end; it is then let go of, or the exit code were 120."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m repro", description="Rebuild the ways an expert-parallel server hangs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    listing = commands.add_parser("list", help="the scenarios, one a line")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=_list, parser=listing)

    run = commands.add_parser("run", help="run a scenario and give its verdict")
    run.add_argument("scenario", metavar="SCENARIO", help='one of them, or "all"')
    run.add_argument("--variant", choices=(*VARIANTS, "all"), default="fault", help="default: fault")
    run.add_argument("--ranks", type=int, dest="num_ranks", metavar="N", help="default: 8")
    run.add_argument("--backend", choices=("gloo", "nccl"), help="default: gloo")
    run.add_argument("--quiet-window", type=float, dest="quiet_window_s", metavar="S", help="default: 1")
    run.add_argument("--deadline", type=float, dest="deadline_s", metavar="S", help="default: 120")
    run.add_argument("--seed", type=int, metavar="N", help="default: 0")
    run.add_argument("--checks", choices=CHECKS, help="default: observe for fault, agree for control and fix")
    run.add_argument("--strict", dest="checks", action="store_const", const="strict", help="as --checks strict")
    run.add_argument("--allow-unsafe", action="store_true", help="start what could hang; a fault is started so anyway")
    _add_server_flags(run)
    run.add_argument("--config", type=Path, metavar="FILE", help="JSON with the keys of a run's config.json")
    run.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    run.add_argument("--launcher", choices=launch.LAUNCHERS, help="default: torchrun, for all fork, which is quicker")
    run.add_argument("--json", action="store_true", help="print the verdicts as a JSON list")
    run.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")
    run.set_defaults(command=_run, parser=run)

    told = "which of layout, kernel backends and kernel cache makes a start slow"
    grid = commands.add_parser("matrix", help=told)
    grid.add_argument("--seed", type=int, metavar="N", help="default: 0")
    grid.add_argument("--deadline", type=float, dest="deadline_s", metavar="S", help="default: 120")
    grid.add_argument("--only", metavar="WORDS", default="", help='cells that have them all, such as "TP8 jit cold"')
    grid.add_argument("--config", type=Path, metavar="FILE", help="JSON with the keys of a run's config.json")
    grid.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    grid.add_argument("--launcher", choices=launch.LAUNCHERS, default="fork", help="default: fork")
    grid.add_argument("--json", action="store_true", help="print the verdicts as a JSON list")
    grid.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")
    grid.add_argument("--script", action="store_true", help="print a shell script for vLLM on 8 GPUs, and run nothing")
    grid.set_defaults(command=_matrix, parser=grid)

    watch = commands.add_parser("watch", help="the verdict on a run directory, live or finished, or on a bundle")
    watch.add_argument("dir", type=Path, metavar="RUN|ZIP")
    watch.add_argument("--end", action="store_true", help="end the run and write verdict.json when it is decided")
    told = "look after the ranks of this host, of which RANK is the first, for a watcher on another host"
    watch.add_argument("--lookout", type=int, metavar="RANK", help=told)
    watch.add_argument("--json", action="store_true")
    watch.set_defaults(command=_watch, parser=watch)

    report_command.add(commands)
    bundle.add(commands)
    minimise.add(commands)

    clean = commands.add_parser("clean", help="remove the runs")
    clean.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    clean.add_argument("--json", action="store_true", help="print what was removed and what still runs")
    clean.set_defaults(command=_clean, parser=clean)
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gdn-prefill-backend", choices=GDN_PREFILL_BACKENDS, help="jit is compiled where it runs")
    parser.add_argument("--moe-backend", choices=MOE_BACKENDS, help="the same for the experts")
    told = "compiled kernels at the start; split: every rank has a cache of its own, and rank 0's alone is cold"
    parser.add_argument("--kernel-cache", choices=KERNEL_CACHES, help=told)
    parser.add_argument(
        "--group-timeout", type=float, dest="group_timeout_s", metavar="S", help="after how long a collective gives up"
    )


def _list(args: argparse.Namespace) -> int:
    rows = []
    for scenario in map(scenarios.load, [*scenarios.names(), *CONFIGURATIONS]):
        faulty = scenarios.settings_of({"scenario": scenario.name, "variant": "fault"})
        rows.append({
            "name": scenario.name, "summary": scenario.summary, "source": scenario.source,
            "expected": scenario.expected(faulty).to_json(), "words": scenario.expected(faulty).words(),
        })  # fmt: skip
    if args.json:
        print(json.dumps([{key: row[key] for key in row if key != "words"} for row in rows], indent=1))
        return EXPECTED
    name_width, verdict_width = (max(len(str(row[key])) for row in rows) for key in ("name", "words"))
    for row in rows:
        print(f"{row['name']:{name_width}}  {row['words']:{verdict_width}}  {row['summary']} ({row['source']})")
    return EXPECTED


def _run(args: argparse.Namespace) -> int:
    variants = VARIANTS if args.variant == "all" else (args.variant,)
    names = scenarios.names() if args.scenario == "all" else [args.scenario]
    runs = [_settings(args, name, variant) for name in names for variant in variants]
    _refuse_junit(args)
    unsafe = {settings: _preflight(settings) for settings in runs}
    if args.config:  # of the sizes that are not a user's, all fit
        refuse_too_large(runs)
    if runs[0].backend == "nccl":
        _require_gpus(runs[0].num_ranks)
    launcher = args.launcher or ("fork" if args.scenario == "all" else "torchrun")
    console = Console(stderr=args.json)
    documents: list[dict[str, Any]] = []
    references: dict[tuple[Any, ...], Path] = {}
    done: list[Path] = []
    said: set[str] = set()
    interrupt = launch.Interrupt()
    with interrupt.installed(), launch.launcher(launcher) as start:
        for number, settings in enumerate(runs, start=1):
            count = f"[{number}/{len(runs)}] " if len(names) > 1 else ""
            title = f"{count}{settings.scenario} {settings.variant}: {settings.num_ranks} ranks, seed {settings.seed}"
            if not (missing := scenarios.load(settings.scenario).missing(settings)):
                for finding in {*unsafe[settings][:1]} - said:
                    say(console, f"unsafe: {finding}")
                    said.add(finding)
                known = references.get(settings.reference_key())
                try:
                    with display(console, title) as shown:
                        run_dir, document = launch.run(settings, args.out, interrupt, shown, start, known)
                except kernel_cache.CannotFill as error:
                    missing = str(error)
            if missing:
                if len(names) == 1 and not documents:
                    raise CannotRunHere(f"{settings.scenario}: {missing}")
                documents.append(launch.skipped(settings, missing))
                say(console, f"{title}: {missing}")
                continue
            documents.append(document)
            references.setdefault(settings.reference_key(), run_dir.reference)
            done.append(run_dir.root)
            if settings.variant == variants[-1] or interrupt():
                _report(console, done)  # each shows its siblings: not before they are all there
                done = []
            told = "" if document["matches_expected"] else ", not as expected"
            told = f"  {document['verdict']}{told}: {run_dir.root / 'report.html'}"
            say(console, told)
            if interrupt():
                break
    if done:  # the last variant could not run here
        _report(console, done)
    if args.junit:
        write_junit(args.junit, documents)
    _print_verdicts(console, documents, args.json)
    return INTERRUPTED if interrupt() else exit_code(documents)


def _matrix(args: argparse.Namespace) -> int:
    if args.script:
        print(matrix.script(), end="")
        return EXPECTED
    document = _document(args)
    flags = {name: value for name in ("seed", "deadline_s") if (value := getattr(args, name)) is not None}
    words = args.only.split()
    wanted = [
        (cell, cell.settings(document, flags))
        for cell in matrix.cells()
        if set(words) <= {cell.layout, cell.gdn, cell.moe, cell.cache}
    ]
    if not wanted:
        raise ConfigError(f"no cell has all of {args.only!r}", "--only")
    _refuse_junit(args)
    if args.config:
        refuse_too_large([settings for _, settings in wanted])
    console = Console(stderr=args.json)

    interrupt = launch.Interrupt()
    with interrupt.installed(), launch.launcher(args.launcher) as start:
        documents = matrix.run(
            wanted,
            args.out,
            interrupt,
            lambda line: say(console, line),
            start,
            lambda it: _report(console, [it]),
        )
    if args.junit:
        write_junit(args.junit, [{**it, "variant": matrix.name(it)} for it in documents])
    if args.json:
        print(json.dumps(documents, indent=1), flush=True)
    else:
        say(console, "\n".join(matrix.table(documents)))
    return INTERRUPTED if interrupt() else exit_code(documents)


def _refuse_junit(args: argparse.Namespace) -> None:
    """Verdicts are not kept from being told by a file that cannot be written; --out may be yet to be made."""
    if args.junit and (args.junit.parent.resolve() != args.out.resolve() or args.out.exists()):
        refuse_unwritable(args.junit, "; choose another --junit")


def _preflight(settings: RunSettings) -> list[str]:
    """What would hang, for a run that is allowed to; raises Refused for one that is not."""
    scenario = scenarios.load(settings.scenario)
    return preflight(scenario.server(settings, 0), scenario.policies(settings, 0))


def _report(console: Console, roots: Sequence[Path]) -> None:
    """Every run so far is shown beside its siblings. A page that cannot be written changes no verdict."""
    try:
        report.write_all(roots)
    except (OSError, ValueError) as error:
        say(console, f"  no report: {error}")


def _print_verdicts(console: Console, documents: list[dict[str, Any]], as_json: bool) -> None:
    """Whoever reads may have left, which changes nothing about the verdicts."""
    try:
        if as_json:
            print(json.dumps(documents, indent=1), flush=True)
        else:
            show = overview if len({document["scenario"] for document in documents}) > 1 else summary
            show(console, documents)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def exit_code(documents: list[dict[str, Any]]) -> int:
    """The code for several verdicts: a wrong one outweighs one that could not be decided."""
    missed = [document["verdict"] for document in documents if not document["matches_expected"]]
    if not missed:
        return EXPECTED
    return CANNOT_TELL if set(missed) == {"inconclusive"} else UNEXPECTED


def _document(args: argparse.Namespace) -> Mapping[str, Any]:
    """The user's --config."""
    document: Mapping[str, Any] = {}
    if args.config is not None:
        try:
            document = read_json(args.config)
        except OSError as error:
            raise ConfigError(f"cannot read it: {error.strerror}", str(args.config)) from error
        if not isinstance(document, dict):
            raise ConfigError("wanted a mapping", str(args.config))
    return document


def _settings(args: argparse.Namespace, scenario: str, variant: str) -> RunSettings:
    document = _document(args)
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
    if engine and isinstance(of_engine := document.get("engine", {}), dict):
        document = {**document, "engine": {**of_engine, **engine}}
    where = str(args.config) if args.config else ""
    return scenarios.settings_of({**flags, "scenario": scenario, "variant": variant}, document, where)


def _require_gpus(num_ranks: int) -> None:
    """Asked in a process of its own, so that this one never loads torch."""
    ask = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    found = int(answer.stdout.strip() or 0) if answer.returncode == 0 else 0
    if found < num_ranks:
        raise CannotRunHere(f"--backend nccl needs a GPU for each of {num_ranks} ranks; {found} found")


def _watch(args: argparse.Namespace) -> int:
    with bundle.opened(args.dir) as root:
        return _watch_run(args, RunDir(root))


def _watch_run(args: argparse.Namespace, run_dir: RunDir) -> int:
    try:
        settings = read_settings(run_dir.config)
    except OSError as error:
        raise ConfigError(f"not a run directory: {error.strerror}", str(run_dir.config)) from error
    console = Console(stderr=args.json)
    if (args.end or args.lookout is not None) and run_dir.verdict.exists():
        option = "--end" if args.end else "--lookout"
        raise ConfigError(f"the run is decided; without {option} it is judged once more", str(run_dir.verdict))
    if args.lookout is not None:
        if args.end or not 0 <= args.lookout < settings.num_ranks:
            why = "cannot be had with --end" if args.end else f"{args.lookout} is none of {settings.num_ranks} ranks"
            raise ConfigError(why, "--lookout")
        Lookout(run_dir, watch_options(settings), args.lookout).run()
        return EXPECTED
    if args.end:
        return _watch_to_end(run_dir, settings, console, args.json)
    try:
        document, whole = judge_again(run_dir, settings)
    except (AttributeError, KeyError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"holds a file that no run of this program leaves: {error}", str(run_dir.root)) from error
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        for line in (document["verdict"], *document["sentences"], *document["evidence"]):
            print(visible_lines(line))
    if document["verdict"] == "inconclusive" or not whole:
        return CANNOT_TELL
    return EXPECTED if document["matches_expected"] else UNEXPECTED


def _watch_to_end(run_dir: RunDir, settings: RunSettings, console: Console, as_json: bool) -> int:
    tails = [Tail(run_dir.witness(rank)) for rank in range(settings.num_ranks)]

    def job_alive() -> bool:
        identities = [tail.who() for tail in tails]
        return any(not who.pid or process.find(who) for who in identities)

    interrupt = launch.Interrupt()
    with interrupt.installed():
        shown = launch.Display(notice=lambda text: say(console, text))
        document = launch.attend(run_dir, settings, interrupt, shown, job_alive)
    _report(console, [run_dir.root])
    _print_verdicts(console, [document], as_json)
    return INTERRUPTED if interrupt() else exit_code([document])


def _clean(args: argparse.Namespace) -> int:
    """Remove what is certainly a run and does not run any more; say what is left."""
    if not args.out.is_dir():
        raise ConfigError("no such folder", str(args.out))
    removed: list[str] = []
    running: list[str] = []
    for root in sorted(args.out.iterdir()):
        if root.is_symlink() or not RUN_NAME.fullmatch(root.name) or not (root / "config.json").is_file():
            continue
        witnesses, _ = read_dir(root / "events")
        if any(process.find(witness.who) for witness in witnesses.values()):
            running.append(str(root))
            print(f"repro: {root}: still runs, left as it is", file=sys.stderr)
            continue
        try:
            shutil.rmtree(root)
        except OSError as error:
            raise OutputError(f"cannot remove {root}: {error.strerror}") from error
        removed.append(str(root))
    latest = args.out / "latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink()
    if args.json:
        print(json.dumps({"removed": removed, "still_running": running}, indent=1))
    return EXPECTED
