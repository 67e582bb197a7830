"""`python -m repro collect [PID…]`: examine a job that hangs now, from outside its processes, and print the verdict."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from repro.commands import diagnose
from repro.exit_codes import USAGE
from repro.hosts.looks.collection import Collection, file_name
from repro.hosts.looks.jobs import Job, choose, find_jobs, match
from repro.hosts.looks.log_files import copy_logs, is_written_by, named
from repro.hosts.looks.look import host_name
from repro.hosts.looks.proc import Status, read_all, uptime_s
from repro.store.run_dir import RunDir
from repro.store.text import escape_control_characters
from repro.verdict.result import list_ranks

INTERVAL_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pids",
        nargs="*",
        default=(),
        type=_pid,
        metavar="PID",
        help="processes of the job; not needed if only one job runs here",
    )
    parser.add_argument(
        "--match", type=_pattern, metavar="REGEX", help="the job whose command lines match this regular expression"
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="make a new folder for the evidence in DIR; default: runs",
    )
    parser.add_argument(
        "--interval", type=_seconds, default=INTERVAL_S, metavar="S", help="seconds between two looks; default: 2"
    )
    parser.add_argument(
        "--allow-signals",
        type=_signal,
        default=0,
        metavar="SIGNAL",
        help="a signal (USR1 or USR2) whose handler in the program prints stacks; sent only to ranks that handle it",
    )
    parser.add_argument(
        "--log",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="logs of the job, even if it has ended; files to which its processes write are found without this option",
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def run(args: argparse.Namespace) -> int:
    """Collect the evidence of a job, and print the verdict on the job.

    Returns 125 for the verdict `inconclusive`, 0 for any other verdict, and 2 if several jobs were found. If no job was
    found, returns 2 without --log; with --log, the logs are the only evidence.
    """
    table = read_all()
    jobs = find_jobs(table)
    if args.pids or args.match:
        pids = _usable(args.pids, table) + (match(args.match, table) if args.match else [])
        jobs = choose(jobs, table, pids)
    elif args.log:
        jobs = [job for job in jobs if any(is_written_by(path, job, table) for path in args.log)]
    try:
        logs = named(args.log or ())
    except (OSError, ValueError) as error:
        args.parser.error(f"--log: {error}")
    if len(jobs) != 1 and (jobs or not logs):
        return _refuse(args, jobs, table)
    run_dir = RunDir.create_collected(args.to, file_name(host_name()))
    if jobs:
        _look_at(Collection(run_dir, jobs[0], args.allow_signals, logs), args.interval, table)
    else:
        _say(f"no process of the job is left; its logs are in {run_dir.root}")
        for line in copy_logs(logs, run_dir.root / "logs"):
            _say(f"not seen: {line}")
    args.paths, args.out = [run_dir.root], run_dir.root
    return diagnose.run(args)


def _look_at(collection: Collection, interval_s: float, table: dict[int, Status]) -> None:
    began_s = time.monotonic()
    folder = collection.run_dir.root
    try:
        collection.collect(interval_s)
    except OSError as error:
        reason = f"{error.strerror}; what was collected before is in {folder}; choose another folder with --to"
        raise OSError(error.errno, reason, error.filename) from error
    took_s = time.monotonic() - began_s
    _say(f"{_describe(collection.job, table)}: looked at twice in {took_s:.1f} s; the evidence is in {folder}")
    for line in collection.hidden:
        _say(f"not seen: {line}")


def _say(text: str) -> None:
    """Print a line to standard error, because only the verdict goes to standard output."""
    print(f"collect: {escape_control_characters(text, 1000)}", file=sys.stderr)


def _usable(pids: Sequence[int], table: dict[int, Status]) -> list[int]:
    for pid in pids:
        if pid not in table:
            _say(f"process {pid} has ended, or is in another pid namespace; if so, run collect in that container")
        elif table[pid].state in "ZX":
            _say(f"process {pid} ({table[pid].name}) has ended; its parent {table[pid].parent} has not reaped it")
    return [pid for pid in pids if pid in table and table[pid].state not in "ZX"]


def _refuse(args: argparse.Namespace, jobs: Sequence[Job], table: dict[int, Status]) -> int:
    if jobs:
        _say(f"{len(jobs)} jobs run here: choose one by a PID or by --match:")
        for job in jobs:
            _say(f"  {_describe(job, table)}")
    elif args.pids or args.match:
        _say("no such process is left to look at; if the job left logs, name them: collect --log FILE…")
    else:
        _say("no torch.distributed job was found on this host: name its processes by collect PID… or --match REGEX")
        _say("of a job that has ended, name the logs: collect --log FILE…")
    return USAGE


def _describe(job: Job, table: dict[int, Status]) -> str:
    """Return a line about a job: "python a.py (master a:29500): ranks 0-7 of 8, 8 processes (41 …), since 310 s".

    table: for each pid of this host, what /proc says about the process
    """
    ranks = sorted({member.rank for member in job.members if member.rank is not None})
    pids = " ".join(map(str, job.pids[:8])) + (" …" if len(job.pids) > 8 else "")
    ages = [uptime_s() - table[pid].started_s for pid in job.pids if pid in table]
    since = f", since {max(ages):.0f} s" if ages else ""
    size = f" of {job.world_size}" if job.world_size else ""
    who = f"ranks {list_ranks(ranks)}{size}, " if ranks else ""
    noun = "process" if len(job.pids) == 1 else "processes"
    return f"{job.name}: {who}{len(job.pids)} {noun} ({pids}){since}"


def _pid(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return int(text)


def _signal(text: str) -> int:
    names = {"USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2}
    if (number := names.get(text.upper().removeprefix("SIG"))) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not USR1 or USR2; other signals end or stop a process")
    return int(number)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 600")
    return value
