"""Run one rank: ``torchrun --nproc-per-node N -m repro.worker SCENARIO --variant V``.

Under ``python -m repro run`` the launcher creates the run directory and watches the run. Under plain torchrun, rank 0
creates the run directory and starts the watcher, so that the run leaves the same files as under `run`.

A rank that has finished or failed does not exit by itself: an early exit would change the evidence that the watcher
collects from other ranks. Such a rank records its state in its witness, and waits until the watcher lets it exit.
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
from hybrid_moe_ref.engine.startup.refusal import check_start
from repro.exit_codes import CANNOT_TELL, USAGE
from repro.hosts.signals import dump_on_signals
from repro.lab import flags, scenarios
from repro.lab.rank import software
from repro.lab.rank.environment import RankEnvironment, refuse_bad_variables
from repro.lab.settings import RunSettings, read_settings
from repro.lab.start.kernel_cache import CannotFill
from repro.lab.start.machine import CannotRunHere, require_model
from repro.lab.start.prepare import prepare_run_dir
from repro.store.description import VARIANTS
from repro.store.run_dir import OutputError, RunDir, write_atomically, write_json
from repro.store.text import escape_lines
from repro.trace.recording.recorder import Recorder

if TYPE_CHECKING:
    import torch.distributed as dist

PARK_INTERVAL_S = 0.05


LAST_RESORT_S = 25.0
"""If the watcher has ended, a rank ends itself this many seconds after the deadline."""


def run_rank(run_dir: RunDir, settings: RunSettings, rank: int, join: Callable[[], dist.Store | None]) -> None:
    """Run one rank: open its witness, serve its requests, and wait until the watcher lets the rank exit.

    join: a function that this function calls as soon as the witness is open. It imports torch and returns the store
    through which the ranks meet, or None if the ranks meet by torchrun's environment variables.
    """
    dump_on_signals(run_dir, rank, interrupts=True)
    faulthandler.dump_traceback_later(settings.deadline_s + LAST_RESORT_S, exit=True)
    recorder = Recorder.open(run_dir.witness(rank), rank, settings.num_ranks)
    try:
        recorder.phase("import")
        gc.disable()  # imports leave no garbage, and a collection takes a tenth of a second
        store = join()
        gc.freeze()
        gc.enable()
        write_atomically(run_dir.environment(rank), software.describe())
        outputs = serve(settings, rank, store, recorder, run_dir.cache)
        write_json(run_dir.output(rank), outputs)
        print(f"[rank {rank}] requests done: {len(outputs)}", flush=True)
        recorder.done()
    # record and print the error, then wait: the watcher must see which rank failed, and where
    except Exception as error:
        recorder.failed(f"{type(error).__name__}: {error}")
        print(f"[rank {rank}] failed:\n{traceback.format_exc()}", flush=True)
    park(run_dir)


def serve(
    settings: RunSettings, rank: int, store: dist.Store | None, recorder: Recorder, cache_dir: Path
) -> dict[str, list[int]]:
    """Start the engine with the scenario's policies (objects that decide for it), and serve the rank's requests.

    Returns a dict from request id to new tokens.

    store: the store through which the ranks meet; None if they meet by torchrun's environment variables
    recorder: writes the rank's witness
    cache_dir: where the engine keeps tuning results and compiled kernels, unless the settings name another folder
    """
    import torch

    from hybrid_moe_ref.engine.lifecycle import Engine
    from hybrid_moe_ref.parallel.checks.store import loopback_store
    from hybrid_moe_ref.parallel.comm import Communicator

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
        # The watcher ends a run. A timeout of a group must not come first, unless the settings ask for one.
        timeout_s=settings.group_timeout_s or settings.deadline_s + 600,
    )
    for _ in range(scenario.starts - 1):
        Engine(server, comm, scenario.policies(settings, rank))
    return Engine(server, comm, scenario.policies(settings, rank)).serve(scenario.requests(settings, rank))


def park(run_dir: RunDir) -> None:
    """Wait until the watcher lets the rank exit. An earlier exit makes other ranks fail and changes the evidence."""
    while not run_dir.release.exists():
        time.sleep(PARK_INTERVAL_S)


def main(argv: list[str] | None = None) -> int:
    """Run the rank of this process. Returns the exit code.

    The code is 2 after a usage error, 125 if this machine cannot do the run, and 0 in all other cases, even if the rank
    fails: the verdict then says so.
    """
    try:
        environment = RankEnvironment.read()
    except ConfigError as error:  # the rank may not be known yet, so every process prints the error
        print(f"repro.worker: {error}", file=sys.stderr)
        return USAGE
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
            print(f"repro.worker: {escape_lines(str(error))}", file=sys.stderr)
        return CANNOT_TELL if isinstance(error, CannotRunHere | CannotFill) else USAGE
    run_rank(run_dir, settings, rank, lambda: None)
    return 0


def run_launched(run_dir: RunDir, rank: int) -> None:
    """Run a rank in a run directory that the launcher created. What the rank prints goes to the rank's log."""
    log = os.open(run_dir.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    settings = read_settings(run_dir.config)
    run_rank(run_dir, settings, rank, lambda: _file_store(run_dir, settings.num_ranks))


def _file_store(run_dir: RunDir, num_ranks: int) -> dist.Store:
    import torch.distributed as dist

    return dist.FileStore(str(run_dir.store), num_ranks)


class _Parser(argparse.ArgumentParser):
    """An argument parser that does not print an error but raises ConfigError, which `main` prints only on rank 0."""

    def error(self, message: str) -> Any:
        raise ConfigError(message)


def _parse(argv: list[str] | None, num_ranks: int) -> tuple[RunSettings, Path]:
    parser = _Parser(prog="torchrun ... -m repro.worker", allow_abbrev=False)
    parser.add_argument("scenario")
    parser.add_argument("--variant", choices=VARIANTS, default="fault")
    flags.add_flags(parser, *(flag.field for flag in flags.FLAGS if flag.field != "num_ranks"))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args(argv)
    settings = flags.settings_of(args.scenario, args.variant, flags.given(args), num_ranks=num_ranks)
    scenario = scenarios.load(settings.scenario)
    check_start(scenario.server(settings, 0), scenario.policies(settings, 0))
    return settings, args.out


def _check_machine(settings: RunSettings, num_local_ranks: int) -> None:
    """Raise CannotRunHere if this host lacks what the scenario needs or, with NCCL, a GPU for each of its ranks."""
    require_model()
    if missing := scenarios.load(settings.scenario).missing(settings):
        raise CannotRunHere(f"{settings.scenario}: {missing}")
    if settings.backend != "nccl":
        return
    import torch

    if (count := torch.cuda.device_count()) < num_local_ranks:
        raise CannotRunHere(
            f"--backend nccl needs a GPU for each of {num_local_ranks} ranks of a host, but this host has {count}"
        )


def _meet(settings: RunSettings, out: Path, environment: RankEnvironment) -> RunDir:
    """Return the run directory. All ranks call this.

    Rank 0 creates the directory, starts the watcher, and publishes the path of the directory in torchrun's store. The
    other ranks read the path there. On each host without rank 0, the first rank starts the agent of this host.

    If rank 0 cannot create the directory, rank 0 raises OutputError or CannotFill, and the other ranks exit.
    """
    import torch.distributed as dist

    if environment.num_local_ranks == environment.num_ranks:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("repro", store)
    if environment.rank != 0:
        root = store.get("run_dir").decode()
        if not root:
            sys.exit(USAGE)  # rank 0 has printed the error
        run_dir = RunDir(Path(root))
        if environment.local_rank == 0:
            _start_watch(run_dir, "--agent", str(environment.rank))
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
        # the agent outlives the ranks: it ends when the run has a verdict and the ranks have ended
        start_new_session=True,
    )
