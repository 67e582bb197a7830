"""Extensions: C++ or CUDA code that torch's extension loader compiles at its first use, on the machine where it runs.

    PREFILL = Extension("gdn_prefill", tuple(Path(__file__).parent.glob("prefill_*.cpp")))
    PREFILL.library().gdn_prefill_f32(...)

Before torch 2.14, the loader excludes other processes by a lock file ("baton"), which it creates and removes. A builder
that is killed leaves this file behind. From torch 2.14 on, the loader takes a lock of the operating system, which ends
with its holder. In both cases a process that waits has no time limit and logs nothing. So a server should load its
extensions before it does anything else (``hybrid_moe_ref.engine.startup.builds``). If `on_first_use` was not called,
`library` compiles in `default_cache()`.

This module imports torch only to compile.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Notify = Callable[[str, str, int], None]
"""A function that is called for each event of a lock or build: (event, name, pid of the lock's holder or -1)."""

BATON = "lock"
"""The name of torch's lock file in the folder of a build.

If `has_baton` is true, the existence of this file is the lock.
"""

BUILT = "built"
"""The file that exists only if an extension is completely built; it contains the name of the library."""

_use_lock, _loader_lock = threading.Lock(), threading.Lock()


class BuildFailed(RuntimeError):
    """A native library could not be compiled; the text is one line that says why."""


@dataclass(frozen=True)
class Extension:
    """One extension: its name and source files. Its functions have C linkage, or register themselves with torch.

    sources      .cpp files, and .cu files for a GPU
    headers      the headers that the sources include, so that a change of a header rebuilds the extension
    cflags       the flags of the C++ compiler
    cuda_cflags  the flags of nvcc
    ldflags      the flags of the linker
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    cflags: tuple[str, ...] = ("-O3",)
    cuda_cflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    _loaded: list[ctypes.CDLL] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_loaded(self) -> bool:
        return bool(self._loaded)

    def library(self) -> ctypes.CDLL:
        """Return the loaded library. The first call builds and loads it, by the function that `on_first_use` set."""
        if not self._loaded:
            with _use_lock:
                if not self._loaded:
                    _first_use[0](self)
        return self._loaded[0]

    def folder(self, cache: Path) -> Path:
        """Return the build folder. Its name has the extension's name and a digest of all that the result depends on.

        The digest includes the paths of the sources and of torch, because ninja rebuilds when a path changes, and two
        clones of this repository share a user's cache.
        """
        digest = hashlib.sha256()
        for path in (*self.sources, *self.headers):
            digest.update(str(path.resolve()).encode() + path.read_bytes())
        flags = (self.cflags, self.cuda_cflags, self.ldflags, os.environ.get("CXX", ""))
        torch = importlib.metadata.distribution("torch")
        made_with = (torch.version, str(torch.locate_file("torch")), sysconfig.get_path("include"), platform.machine())
        digest.update(repr((flags, made_with)).encode())
        return cache / f"{self.name}-{digest.hexdigest()[:12]}"

    def is_built(self, cache: Path) -> bool:
        """Whether the extension is compiled, so that `load` need not compile. An interrupted build does not count."""
        return (self.folder(cache) / BUILT).exists()

    def load_built(self, cache: Path) -> None:
        """Load an extension that is built (see `is_built`), without a compiler and without a lock."""
        folder = self.folder(cache)
        self._load(folder / (folder / BUILT).read_text())

    def load(self, cache: Path, notify: Notify = lambda event, name, holder: None) -> None:
        """Compile the extension if necessary, with torch's extension loader under its lock, and load it.

        Raises BuildFailed, or OSError if the folder cannot be used. Waits without a limit if another process has the
        lock.
        """
        folder = self.folder(cache)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with loader() as cpp_extension, _observed_lock(self.name, notify):
                path = cpp_extension.load(
                    self.name,
                    [str(source) for source in self.sources],
                    extra_cflags=list(self.cflags),
                    extra_cuda_cflags=list(self.cuda_cflags),
                    extra_ldflags=list(self.ldflags),
                    build_directory=str(folder),
                    is_python_module=False,
                )
        # SubprocessError: the compiler could not even print its version
        except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
            raise BuildFailed(f"{self.name} could not be built: {_reason(str(error))}") from error
        self._load(Path(path))
        partial = folder / f"{BUILT}.{os.getpid()}"
        partial.write_text(Path(path).name)
        partial.replace(folder / BUILT)

    def _load(self, path: Path) -> None:
        """Load the library, which also registers its operators with torch if it has any."""
        self._loaded[:] = [ctypes.CDLL(str(path))]


def default_cache() -> Path:
    """Return the folder of the user's compiled extensions: HMR_KERNEL_CACHE, or a folder in the user's own cache."""
    if folder := os.environ.get("HMR_KERNEL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_moe_ref" / "kernels"


_first_use: list[Callable[[Extension], None]] = [lambda extension: extension.load(default_cache())]


def on_first_use(load: Callable[[Extension], None]) -> None:
    """Set the function `load` by which this process loads each extension at its first use."""
    _first_use[0] = load


def missing() -> str:
    """Return what this machine lacks to build an extension; "" if nothing. It searches for programs and runs none."""
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]
    if not shutil.which(compiler, path=_search_path()):
        return (
            f"kernels are compiled on this machine, but there is no C++ compiler {compiler}: install one, or name one "
            "in CXX"
        )
    if not shutil.which("ninja", path=_search_path()):
        return "kernels are compiled on this machine with the program ninja, which is not installed: pip install ninja"
    return ""


def _search_path() -> str:
    """Return PATH with this interpreter's folder in front, to find ninja in an environment that is not activated."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


@contextlib.contextmanager
def loader() -> Iterator[Any]:
    """Yield torch's extension loader. Only one thread can have it at a time.

    Inside the ``with``, the loader finds the programs that `missing` finds. When this process ends, for whatever
    reason, the ninja that the loader runs ends, too.
    """
    from torch.utils import cpp_extension

    with _loader_lock:
        path = os.environ.get("PATH")
        os.environ["PATH"] = _search_path()
        cpp_extension.subprocess = _Subprocess()  # type: ignore[assignment]
        try:
            yield cpp_extension
        finally:
            cpp_extension.subprocess = subprocess
            if path is None:
                del os.environ["PATH"]
            else:
                os.environ["PATH"] = path


class _Subprocess:
    """A replacement for the module subprocess, by which torch's loader runs ninja.

    With this replacement, ninja gets SIGTERM when this process ends, and then ends its compilers.
    """

    _START = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG, which an exec keeps
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def run(self, command: list[str], **options: Any) -> Any:
        if sys.platform == "linux":
            command = [sys.executable, "-IS", "-c", self._START, str(os.getpid()), *command]
        return subprocess.run(command, **options)


def has_baton() -> bool:
    """Whether torch's loader uses a lock file whose existence is the lock (before torch 2.14)."""
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "FileBaton")


@contextlib.contextmanager
def _observed_lock(name: str, notify: Notify) -> Iterator[None]:
    """Inside the ``with``, call `notify` for each event of torch's own lock and of the build that it protects."""
    from torch.utils import cpp_extension

    attribute, observed = ("FileBaton", _observed_baton) if has_baton() else ("FileLock", _observed_file_lock)
    plain = getattr(cpp_extension, attribute)
    setattr(cpp_extension, attribute, observed(plain, name, notify))
    try:
        yield
    finally:
        setattr(cpp_extension, attribute, plain)


def _observed_baton(plain: Any, name: str, notify: Notify) -> type:
    class ObservedBaton(plain):
        def try_acquire(self) -> bool:
            mine = bool(super().try_acquire())
            if mine:
                notify("lock_held", self.lock_file_path, os.getpid())
                notify("build_begin", name, -1)
            return mine

        def wait(self) -> None:
            notify("lock_wait", self.lock_file_path, -1)  # the lock file does not name its holder
            super().wait()
            notify("lock_freed", self.lock_file_path, -1)

        def release(self) -> None:
            super().release()
            notify("build_end", name, -1)
            notify("lock_freed", self.lock_file_path, -1)

    return ObservedBaton


def _observed_file_lock(plain: Any, name: str, notify: Notify) -> type:
    class ObservedFileLock(plain):
        def __enter__(self) -> Any:
            notify("lock_wait", self.lock_file, -1)
            entered = super().__enter__()
            notify("lock_held", self.lock_file, os.getpid())
            notify("build_begin", name, -1)
            return entered

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            notify("build_end", name, -1)
            notify("lock_freed", self.lock_file, -1)

    return ObservedFileLock


def _reason(output: str) -> str:
    """Extract from a build's output the line that gives the reason of the failure."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reasons = ("error:", "not found", "no space left", "permission denied", "no such file", "read-only")
    for line in lines:
        if any(words in line.lower() for words in reasons):
            return line[:300]
    return lines[0][:300] if lines else "no reason given"
