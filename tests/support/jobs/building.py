"""Small runs for tests whose kernels are compiled on this machine."""

from __future__ import annotations

from pathlib import Path

from hybrid_moe_ref.engine.startup.builds import BuildPlace
from hybrid_moe_ref.parallel.observer import NullObserver
from repro.lab import scenarios


def small(name, variant="fault", num_ranks=4, cache_dir="", **flags):
    """Return the settings of a run on four ranks and four layers. ``cache_dir`` remains after the run."""
    engine = {"unfinished_interval": 16, "cache_dir": str(cache_dir)}
    document = {"num_ranks": num_ranks, "model": {"layer_pattern": "GMAG"}, "engine": engine}
    return scenarios.settings_of({"scenario": name, "variant": variant, **flags}, document)


def place(cache, rank=0, **options):
    return BuildPlace(Path(cache), rank, NullObserver(), **options)
