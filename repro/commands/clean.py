"""``clean``: remove the run directories whose processes have ended."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from repro.exit_codes import EXPECTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs; default: runs")
    parser.add_argument(
        "--json", action="store_true", help="print which runs were removed and which still run, as JSON"
    )


def run(args: argparse.Namespace) -> int:
    """Remove the run directories in the folder --out whose processes have ended.

    A folder counts as a run directory if its name has the form of one (RUN_NAME) and it contains a config.json.

    Raises ConfigError if the folder --out does not exist, and OutputError if a run directory cannot be removed.
    """
    from hybrid_moe_ref.config import ConfigError
    from repro.hosts import processes
    from repro.store.run_dir import RUN_NAME, OutputError
    from repro.trace.witness.file import read_dir

    if not args.out.is_dir():
        raise ConfigError("no such folder", str(args.out))
    removed: list[str] = []
    running: list[str] = []
    for root in sorted(args.out.iterdir()):
        if root.is_symlink() or not RUN_NAME.fullmatch(root.name) or not (root / "config.json").is_file():
            continue
        witnesses, _ = read_dir(root / "events")
        if any(processes.find(witness.writer) for witness in witnesses.values()):
            running.append(str(root))
            print(f"repro: {root}: not removed, because its processes still run", file=sys.stderr)
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
