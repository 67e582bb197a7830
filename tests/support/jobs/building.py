"""Small runs for tests whose kernels are compiled on this machine."""

from __future__ import annotations

import fcntl
import pickle
from pathlib import Path

from forked import run_forked

from hybrid_moe_ref.engine.startup.builds import BuildPlace
from hybrid_moe_ref.parallel.observer import NullObserver
from repro.lab import scenarios


def small(name, variant="fault", num_ranks=4, cache_dir="", **flags):
    """Return the settings of a run on four ranks and four layers. ``cache_dir`` remains after the run."""
    engine = {"unfinished_interval": 16, "cache_dir": str(cache_dir)}
    document = {"num_ranks": num_ranks, "model": {"layer_pattern": "GMAG"}, "engine": engine}
    return scenarios.settings_of({"scenario": name, "variant": variant, **flags}, document)


def compiling_run(out):
    """Return the directory, verdict, notices and kernel cache of a run that compiles both extensions.

    The first process that needs the run makes it in ``out``; the other processes of a session wait for it.
    """
    out.mkdir(exist_ok=True)
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = out / "made"
        if not made.exists():
            noticed = []
            settings = small("cold_jit", cache_dir=out / "cache", quiet_window_s=0.5)  # a third of the quickest build
            run_dir, document = run_forked(settings, out, notice=noticed.append)
            made.write_bytes(pickle.dumps((run_dir, document, noticed)))
        return *pickle.loads(made.read_bytes()), out / "cache" / "kernels"


def place(cache, rank=0, **options):
    return BuildPlace(Path(cache), rank, NullObserver(), **options)
