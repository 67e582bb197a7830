"""What holds for all tests, and the one run that compiles for them."""

import gc
import os

import pytest

# Before torch is imported, and for the processes that tests start: threads that wait for each other are most of the
# time of small tensors, and a rank that is forked finds none of its parent's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HMR_KERNEL_CHECKS", "1")  # also of the calls that a model makes


def pytest_collection_finish() -> None:
    """Modules and tests are no garbage: looking through them takes time, and makes ranks copy their pages."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cold_run(tmp_path_factory):
    """The one run that compiles: its directory, verdict, notices and cache, which is the warm one of the others."""
    from building import small  # not before the environment above is set
    from forked import run_forked

    out, noticed = tmp_path_factory.mktemp("cold"), []
    run_dir, document = run_forked(small("cold_jit", cache_dir=out / "cache"), out, notice=noticed.append)
    os.environ["HMR_KERNEL_CACHE"] = str(out / "cache" / "kernels")
    yield run_dir, document, noticed, out / "cache" / "kernels"
    del os.environ["HMR_KERNEL_CACHE"]
