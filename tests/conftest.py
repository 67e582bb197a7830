"""What holds for all tests."""

import gc
import os

# Before torch is imported, and for the processes that tests start: threads that wait for each other are most of the
# time of small tensors, and a rank that is forked finds none of its parent's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HMR_KERNEL_CHECKS", "1")  # also of the calls that a model makes


def pytest_collection_finish() -> None:
    """Modules and tests are no garbage: looking through them takes time, and makes ranks copy their pages."""
    gc.collect()
    gc.freeze()
