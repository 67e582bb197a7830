"""The hooks of collectives and the writer of the witness in C, which are compiled to one library.

The command ``record`` and the vLLM plug-in build the library once into the user's cache, if a C compiler and Python's
headers are installed. This takes two seconds. A rank loads the library if it exists. If not, the rank records in
Python. The witness then has the same bytes, but each collective takes some microseconds longer. HMR_RECORD_PURE=1 makes
a rank record in Python.

    checksum.h     the checksum of a record
    calls.h        what the recorder keeps for each process group and for each call site of a collective
    tape.h         the writer of the witness
    options.h      the options of a call of a collective, such as the root rank
    read.h         reads a call's arguments, and finds what the recorder keeps for this call
    works.h        issued collectives that may be incomplete (torch calls them works)
    exchange.h     the hook of a method by which ranks exchange rows, such as vLLM's all_gatherv
    steps.h        the hook of vLLM's step agreement, and the progress of a worker
    fast.c         the hooks of collectives
    recorder.py    the recorder of a rank on top of the writer
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

NAME = "hmr_record"
SOURCES = ("checksum.h", "calls.h", "tape.h", "options.h", "read.h", "works.h", "exchange.h", "steps.h", "fast.c")
FLAGS = ("-O2", "-fPIC", "-shared", "-std=gnu11")
BUILD_LIMIT_S = 60.0

_HERE = Path(__file__).parent


def is_supported() -> bool:
    """Whether this interpreter can load the library: 64-bit CPython with its interpreter lock, little-endian."""
    return (
        sys.implementation.name == "cpython"
        and sys.byteorder == "little"
        and sys.maxsize > 2**32
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
    )


def path() -> Path:
    """Return the path of the library for this interpreter, whether it exists or not.

    The file name has a digest of the sources and the compiler flags, so changed sources give another library.
    """
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in SOURCES:
        digest.update((_HERE / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    return cache / "hybrid_moe_ref" / "record" / f"{NAME}-{digest.hexdigest()[:16]}-{tag}.so"


def build() -> str:
    """Build the library, unless it exists. Returns why it cannot be built; "" if it exists now."""
    if not is_supported():
        return "this interpreter is not supported: it must be 64-bit CPython with its interpreter lock, little-endian"
    try:
        library = path()
        if library.exists():
            return ""
        compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc")
        include = sysconfig.get_paths()["include"]
        if compiler is None:
            return "there is no C compiler: install one, or set CC"
        if not os.path.exists(os.path.join(include, "Python.h")):
            return f"{include} has no Python.h: install Python's headers"
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *FLAGS, f"-I{include}", str(_HERE / "fast.c"), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=BUILD_LIMIT_S)
            if done.returncode:
                return f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
            os.replace(made, library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        return f"{type(error).__name__}: {error}"
    return ""


@functools.cache
def load() -> Any:
    """Return the library as a module; None if this process must record in Python.

    It records in Python with HMR_RECORD_PURE=1, and if `is_supported` returns False. It also does so if the library
    does not exist, cannot be loaded, or belongs to a user other than root and the user of this process.
    """
    if os.environ.get("HMR_RECORD_PURE") == "1" or not is_supported():
        return None
    with contextlib.suppress(OSError, RuntimeError, ImportError):
        library = path()
        if library.stat().st_uid not in (os.getuid(), 0):  # another user's code is not run
            return None
        loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
        spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
        if spec is not None:
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
            return module
    return None
