"""The C++ kernels as one library: built by torch's extension loader, cached by a digest of the sources, loaded once.

`prepare` builds or loads the library; until then the native backend is missing. The library is a file in `folder()`.
The file's name has a digest of the sources, the flags and torch's version, but not of the compiler. To build the
library with another compiler, remove the file. Loading needs no compiler.

A build works in a private folder and moves the complete library into place, so a failed or killed build leaves no
partial library. The next build removes the folder that a killed build left. One process builds at a time. The others
wait for its `build_lock`, for at most LOCK_LIMIT_S.

Loading chooses the best instruction set that the processor has. HMR_NATIVE_ISA chooses another of INSTRUCTION_SETS.
"""

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import io
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from hybrid_moe_kernels import extension
from hybrid_moe_kernels.build_lock import BuildLock, LockTimeout
from hybrid_moe_kernels.choices import INSTRUCTION_SETS as INSTRUCTION_SETS
from hybrid_moe_kernels.extension import BuildFailed

DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ("cpu",)

LOCK_LIMIT_S = 600.0
"""Seconds that a process waits while another one builds."""

SILENT_S = 5.0
"""If a build takes longer than this many seconds, a line says what takes so long."""

_NAME = "hybrid_moe_native"
_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
_HERE = Path(__file__).parent
_log = logging.getLogger("hybrid_moe_kernels")
_library: ModuleType | None = None
_error = ""
_failed: Path | None = None  # a library that could not be built or loaded, and is not tried again


def _nothing() -> None: ...


def library() -> ModuleType:
    """Return the loaded library. Call this only after a `prepare` that returned ""."""
    assert _library is not None, _error
    return _library


def missing() -> str:
    """Return what the native backend lacks in this process; "" if nothing."""
    return (
        ""
        if _library
        else _error
        or ("the library is not loaded: call `prepare` first, because a call of a kernel does not build the library")
    )


def folder() -> Path:
    """Return the folder of built libraries: HMR_NATIVE_DIR; if it is not set or empty, a folder in the user's cache."""
    if native := os.environ.get("HMR_NATIVE_DIR"):
        return Path(native)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_moe_kernels"


def sources() -> list[Path]:
    """Return the files whose change requires a new library."""
    return sorted([*_HERE.glob("cpp/*.h"), *_HERE.glob("cpp/*.cpp"), *_HERE.glob("*/native.cpp")])


def path() -> Path:
    """Return the path of this library, whether it is built or not."""
    digest = hashlib.sha256()
    for source in sources():
        digest.update(source.relative_to(_HERE).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    built_with = [torch.__version__, sys.implementation.cache_tag, platform.machine(), *_FLAGS]
    digest.update("\0".join(map(str, built_with)).encode())
    return folder() / f"{_NAME}-{digest.hexdigest()[:16]}.so"


def prepare(tick: Callable[[], None] = _nothing) -> str:
    """Load the library; build it first if it is not in the cache. Returns the reason of a failure; "" if none.

    tick: called several times a second, for heartbeats, while this process builds or waits for another process that
    builds. If it raises an exception, such a wait ends at once, but this process's own build is completed first

    Raises ValueError, before any build, if HMR_NATIVE_ISA is not one of INSTRUCTION_SETS.
    """
    global _library, _error, _failed
    isa = os.environ.get("HMR_NATIVE_ISA", "")
    if isa not in ("", *INSTRUCTION_SETS):
        raise ValueError(f"HMR_NATIVE_ISA: {isa!r} is not one of {', '.join(INSTRUCTION_SETS)}")
    target = path()
    if _library is None and target != _failed:
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with _lock(target.parent, tick) as lock:
                    if not target.exists():
                        _build_beating(target, lock, tick)
            _library = _load(target, isa)
            _error = ""
        except (BuildFailed, LockTimeout, OSError, ImportError, ValueError) as error:
            _error, _failed = " ".join(str(error).split()), target
    return missing()


def _build_beating(target: Path, lock: BuildLock, tick: Callable[[], None]) -> None:
    """Build in a new thread. Meanwhile the calling thread sends the heartbeats of the lock and calls ``tick``."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            build(target)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="build native")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            lock.beat()
            tick()
    finally:
        thread.join()
    if failure:
        raise failure[0]


def _lock(place: Path, tick: Callable[[], None]) -> BuildLock:
    """Return the lock of builds in the folder `place`. A line is logged if another process holds the lock."""

    def notify(event: str, name: str, holder: int) -> None:
        if event == "lock_wait":
            process = f"process {holder}" if holder > 0 else "another process"
            _log.warning(f"kernels: native: waiting for {process}, which builds in {place}")

    return BuildLock(place / ".lock", deadline_s=LOCK_LIMIT_S, notify=notify, check=tick)


def cannot_build() -> str:
    """Return what this machine lacks to build the library; "" if nothing. It only searches for files."""
    python_h = Path(sysconfig.get_path("include"), "Python.h")
    if not python_h.exists():
        return f"Python's headers are not installed: there is no {python_h} (Debian: apt-get install python3-dev)"
    return extension.missing()


def build(target: Path) -> None:
    """Compile the library and link it into `target`. Raises BuildFailed or OSError."""
    if lack := cannot_build():
        raise BuildFailed(lack)
    for left in target.parent.glob(f".{_NAME}+*"):  # left by a killed build, because no other build can run now
        shutil.rmtree(left, ignore_errors=True)
    private = Path(tempfile.mkdtemp(prefix=f".{_NAME}+{platform.node()}+{os.getpid()}+", dir=target.parent))
    said = io.StringIO()
    try:
        with extension.loader() as cpp_extension, contextlib.redirect_stdout(said):
            # Without this, a second build would get another name.
            cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(_NAME, None)
            cpp_extension.load(
                _NAME,
                [str(source) for source in sorted(_HERE.glob("cpp/*.cpp"))],
                extra_cflags=_FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=str(private),
                is_python_module=False,  # the library is loaded later, from its final place
                is_standalone=False,
            )
        os.replace(private / f"{_NAME}.so", target)
    except RuntimeError as error:
        lines = [line.strip() for line in f"{error}\n{said.getvalue()}".splitlines() if "error" in line.lower()]
        raise BuildFailed(f"the build failed: {lines[1] if len(lines) > 1 else error}") from None
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _load(target: Path, isa: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(target))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if isa:
        if isa not in module.instruction_sets():
            has = ", ".join(module.instruction_sets())
            raise ValueError(f"HMR_NATIVE_ISA: this processor does not have {isa!r}, only {has}")
        module.use_instruction_set(isa)
    return module
