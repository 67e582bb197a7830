"""One rank: ``torchrun --nproc-per-node N -m repro.worker SCENARIO --variant V``.

Under ``python -m repro run`` the launcher has made the run directory and watches it. Started by plain torchrun,
rank 0 makes the run directory and starts the watcher itself, so that the run ends with the same files.

A rank never ends on its own while its peers may still be looked at: it records that it is done or failed, and
parks until the watcher lets it go.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine.refusal import preflight
from hybrid_moe_ref.engine.server_config import CHECKS
from repro.hosts.signals import dump_on_signals
from repro.lab import loaded, scenarios
from repro.lab.environment import RankEnvironment, refuse_bad_variables
from repro.lab.kernel_cache import CannotFill
from repro.lab.launch import CANNOT_TELL, CannotRunHere, prepare_run_dir
from repro.lab.settings import RunSettings, read_settings
from repro.store.description import VARIANTS
from repro.store.run_dir import OutputError, RunDir, write_atomically, write_json
from repro.store.text import escape_lines
from repro.trace.recorder import Recorder

if TYPE_CHECKING:
    import torch.distributed as dist

PARK_INTERVAL_S = 0.05


LAST_RESORT_S = 25.0
"""How long after its deadline a rank ends itself, should the watcher be gone: within the 30 s that are promised."""


def run_rank(run_dir: RunDir, settings: RunSettings, rank: int, join: Callable[[], dist.Store | None]) -> None:
    """Everything that one rank does, from opening its witness to parking.

    join: called after the witness is open; imports torch and returns the store that the ranks meet through,
    or None for torchrun's environment.
    """
    dump_on_signals(run_dir, rank, interrupts=True)
    faulthandler.dump_traceback_later(settings.deadline_s + LAST_RESORT_S, exit=True)
    recorder = Recorder.open(run_dir.witness(rank), rank, settings.num_ranks)
    try:
        recorder.phase("import")
        gc.disable()  # of what a module makes nothing is garbage, and to look for it costs a tenth of a second
        store = join()
        gc.freeze()
        gc.enable()
        write_atomically(run_dir.environment(rank), loaded.describe())
        outputs = serve(settings, rank, store, recorder, run_dir.cache)
        write_json(run_dir.output(rank), outputs)
        print(f"[rank {rank}] requests done: {len(outputs)}", flush=True)
        recorder.done()
    except Exception as error:  # recorded, printed and parked: peers and watcher must see who failed, and where
        recorder.failed(f"{type(error).__name__}: {error}")
        print(f"[rank {rank}] failed:\n{traceback.format_exc()}", flush=True)
    park(run_dir)


def serve(
    settings: RunSettings, rank: int, store: dist.Store | None, recorder: Recorder, cache_dir: Path
) -> dict[str, list[int]]:
    """Start the engine with the scenario's policies and serve this rank's requests; the new tokens by request.

    cache_dir: where an engine that tunes or compiles keeps the outcome, unless the settings name a folder
    """
    import torch

    from hybrid_moe_ref.engine.lifecycle import Engine
    from hybrid_moe_ref.parallel.comm import Communicator
    from hybrid_moe_ref.parallel.store import loopback_store

    torch.set_num_threads(1)
    scenario = scenarios.load(settings.scenario)
    server = scenario.server(settings, rank)
    engine = server.engine
    if (engine.autotune or engine.compile or engine.compiles_kernels) and not engine.cache_dir:
        server = dataclasses.replace(server, engine=dataclasses.replace(engine, cache_dir=str(cache_dir)))
    on_gpu = settings.backend == "nccl"
    recorder.phase("connect")
    if settings.effective_checks == "strict" and store is not None:
        store = loopback_store(store, rank, settings.num_ranks)
    comm = Communicator.connect(
        server.parallel,
        rank,
        backend=settings.backend,
        store=store,
        device=torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu"),
        observer=recorder,
        # The watcher ends a run: unless it is asked for, a group's own timeout must not come first.
        timeout_s=settings.group_timeout_s or settings.deadline_s + 600,
    )
    for _ in range(scenario.starts - 1):
        Engine(server, comm, scenario.policies(settings, rank))
    return Engine(server, comm, scenario.policies(settings, rank)).serve(scenario.requests(settings, rank))


def park(run_dir: RunDir) -> None:
    """Wait for the watcher's word: the first rank that exits takes its peers' evidence with it."""
    while not run_dir.release.exists():
        time.sleep(PARK_INTERVAL_S)


def main(argv: list[str] | None = None) -> int:
    """Entry point under torchrun: 0, 2 for a usage error, 125 for what cannot run here."""
    try:
        environment = RankEnvironment.read()
    except ConfigError as error:  # rank 0 may not be known, so each says it
        print(f"repro.lab.worker: {error}", file=sys.stderr)
        return 2
    rank = environment.rank
    if environment.run_dir:
        run_launched(RunDir(environment.run_dir), rank)
        return 0
    try:
        refuse_bad_variables()
        settings, out = _parse(argv, environment.num_ranks)
        _check_machine(settings, environment.num_local_ranks)
        run_dir = _meet(settings, out, environment)
    except (ConfigError, OutputError, CannotRunHere, CannotFill) as error:
        if rank == 0:
            print(f"repro.lab.worker: {escape_lines(str(error))}", file=sys.stderr)
        return CANNOT_TELL if isinstance(error, CannotRunHere | CannotFill) else 2
    run_rank(run_dir, settings, rank, lambda: None)
    return 0


def run_launched(run_dir: RunDir, rank: int) -> None:
    """A rank of a run directory that the launcher made, printing into its log."""
    log = os.open(run_dir.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    settings = read_settings(run_dir.config)
    run_rank(run_dir, settings, rank, lambda: _file_store(run_dir, settings.num_ranks))


def _file_store(run_dir: RunDir, num_ranks: int) -> dist.Store:
    import torch.distributed as dist

    return dist.FileStore(str(run_dir.store), num_ranks)


class _Parser(argparse.ArgumentParser):
    """Errors are raised, for one rank to print in one line."""

    def error(self, message: str) -> Any:
        raise ConfigError(message)


def _parse(argv: list[str] | None, num_ranks: int) -> tuple[RunSettings, Path]:
    parser = _Parser(prog="torchrun ... -m repro.worker", allow_abbrev=False)
    parser.add_argument("scenario")
    parser.add_argument("--variant", choices=VARIANTS, default="fault")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--checks", choices=CHECKS, default="")
    parser.add_argument("--allow-unsafe", action="store_true")
    parser.add_argument("--quiet-window", type=float, default=1.0, metavar="S")
    parser.add_argument("--deadline", type=float, default=120.0, metavar="S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args(argv)
    flags = {
        "scenario": args.scenario,
        "variant": args.variant,
        "num_ranks": num_ranks,
        "backend": args.backend,
        "quiet_window_s": args.quiet_window,
        "deadline_s": args.deadline,
        "seed": args.seed,
        "checks": args.checks,
        "allow_unsafe": args.allow_unsafe,
    }
    settings = scenarios.settings_of(flags)
    scenario = scenarios.load(settings.scenario)
    preflight(scenario.server(settings, 0), scenario.policies(settings, 0))
    return settings, args.out


def _check_machine(settings: RunSettings, num_local_ranks: int) -> None:
    """Raises CannotRunHere for what the scenario lacks here, and without a GPU for each rank of this host."""
    if missing := scenarios.load(settings.scenario).missing(settings):
        raise CannotRunHere(f"{settings.scenario}: {missing}")
    if settings.backend != "nccl":
        return
    import torch

    if (count := torch.cuda.device_count()) < num_local_ranks:
        raise CannotRunHere(f"--backend nccl needs a GPU for each of {num_local_ranks} ranks of a host; {count} found")


def _meet(settings: RunSettings, out: Path, environment: RankEnvironment) -> RunDir:
    """Agree on the run directory through torchrun's store. Rank 0 makes it and starts the watcher, and the first rank
    of each other host starts the agent there."""
    import torch.distributed as dist

    if environment.num_local_ranks == environment.num_ranks:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("repro", store)
    if environment.rank != 0:
        root = store.get("run_dir").decode()
        if not root:
            sys.exit(2)  # rank 0 said why
        run_dir = RunDir(Path(root))
        if environment.local_rank == 0:
            _start_watch(run_dir, "--lookout", str(environment.rank))
        return run_dir
    try:
        run_dir = prepare_run_dir(out, settings)
    except (OutputError, CannotFill):
        store.set("run_dir", "")
        raise
    _start_watch(run_dir, "--end")
    store.set("run_dir", str(run_dir.root))
    return run_dir


def _start_watch(run_dir: RunDir, *options: str) -> None:
    subprocess.Popen(
        [sys.executable, "-m", "repro", "watch", str(run_dir.root), *options],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # it outlives the ranks, and ends when the run is decided and they are gone
    )
