"""Native modules that are compiled on the machine they run on, at their first use, by torch's extension loader.

    PREFILL = Extension("gdn_prefill", tuple(Path(__file__).parent.glob("prefill_*.cpp")))
    PREFILL.library().gdn_prefill_f32(...)

The loader keeps other processes away with a lock file that it creates and removes ("baton"). Whoever waits for it
waits without a limit and without a word, and a builder that is killed leaves the file behind: a server should load
its extensions before it does anything else (``hybrid_moe_ref.engine.builds``). Until something else is arranged,
`library` compiles in `default_cache()`.

torch is imported when something is compiled.
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

Tell = Callable[[str, str, int], None]
"""Hears of locks and builds: (event, name, pid of the holder or -1), as an Observer's `local`."""

BATON = "lock"
"""What torch calls its lock file, in the folder that it builds in."""

BUILT = "built"
"""The file that is there when a module has been built to its end; it names the library."""

_use_lock, _loader_lock = threading.Lock(), threading.Lock()


class BuildFailed(RuntimeError):
    """An extension could not be compiled; the text is one line that says which and why."""


@dataclass(frozen=True)
class Extension:
    """A native module: what it is called and made of. Functions have C linkage, or register themselves with torch.

    sources      .cpp, and .cu for a GPU
    headers      what they include, so that a change of it is a change of the module
    cflags       for the C++ compiler; cuda_cflags for nvcc
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
        """The module's functions. The first call builds and loads it, as arranged by `on_first_use`."""
        if not self._loaded:
            with _use_lock:
                if not self._loaded:
                    _first_use[0](self)
        return self._loaded[0]

    def folder(self, cache: Path) -> Path:
        """Where it is built: its name, and a digest of everything that the result depends on. Also of where the sources
        and torch are: ninja builds anew when a path is another, and two clones share a user's cache.
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
        """Whether `load` has nothing to compile. What was interrupted does not count as built."""
        return (self.folder(cache) / BUILT).exists()

    def load_built(self, cache: Path) -> None:
        """Load what `is_built`, without a compiler and without a lock."""
        folder = self.folder(cache)
        self._load(folder / (folder / BUILT).read_text())

    def load(self, cache: Path, tell: Tell = lambda event, name, holder: None) -> None:
        """Compile what is not compiled yet, and load it: torch's way, with torch's lock.

        Raises BuildFailed, or an OSError when the folder cannot be used. Waits for as long as the lock file exists.
        """
        folder = self.folder(cache)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with loader() as cpp_extension, _observed_baton(self.name, tell):
                path = cpp_extension.load(
                    self.name,
                    [str(source) for source in self.sources],
                    extra_cflags=list(self.cflags),
                    extra_cuda_cflags=list(self.cuda_cflags),
                    extra_ldflags=list(self.ldflags),
                    build_directory=str(folder),
                    is_python_module=False,
                )
        except (RuntimeError, ImportError, subprocess.SubprocessError) as error:  # the last: not even its version
            raise BuildFailed(f"{self.name} could not be built: {_reason(str(error))}") from error
        self._load(Path(path))
        partial = folder / f"{BUILT}.{os.getpid()}"
        partial.write_text(Path(path).name)
        partial.replace(folder / BUILT)

    def _load(self, path: Path) -> None:
        """For functions of its own and for operators that it registers with torch alike."""
        self._loaded[:] = [ctypes.CDLL(str(path))]


def default_cache() -> Path:
    """Where compiled modules are kept for the user: HMR_KERNEL_CACHE, or a folder in the user's own cache."""
    if told := os.environ.get("HMR_KERNEL_CACHE"):
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_moe_ref" / "kernels"


_first_use: list[Callable[[Extension], None]] = [lambda extension: extension.load(default_cache())]


def on_first_use(load: Callable[[Extension], None]) -> None:
    """From here on `load` brings in whatever is used and not loaded yet, in this process."""
    _first_use[0] = load


def missing() -> str:
    """What this machine lacks to build an extension, "" for nothing. Programs are looked for, and not run."""
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]
    if not shutil.which(compiler, path=_search_path()):
        return f"kernels are compiled, and there is no C++ compiler {compiler}: install one, or name one in CXX"
    if not shutil.which("ninja", path=_search_path()):
        return "kernels are compiled with the program ninja, which is not installed (pip install ninja)"
    return ""


def _search_path() -> str:
    """Programs beside this interpreter come first: a virtual environment has its ninja there, activated or not."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


@contextlib.contextmanager
def loader() -> Iterator[Any]:
    """torch's extension loader, for one build at a time. Inside, it finds what `missing` finds, and its ninja ends with
    this process, however that ends.
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
    """The module subprocess as torch's loader sees it: what it runs, which is ninja, gets SIGTERM when this process is
    gone, and then ends its compilers.
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


@contextlib.contextmanager
def _observed_baton(name: str, tell: Tell) -> Iterator[None]:
    """Inside, torch's own lock says what happens to it: nothing else about it changes."""
    from torch.utils import cpp_extension

    plain: Any = cpp_extension.FileBaton

    class ObservedBaton(plain):
        def try_acquire(self) -> bool:
            mine = bool(super().try_acquire())
            if mine:
                tell("lock_held", self.lock_file_path, os.getpid())
                tell("build_begin", name, -1)
            return mine

        def wait(self) -> None:
            tell("lock_wait", self.lock_file_path, -1)  # the file does not say whose it is
            super().wait()
            tell("lock_freed", self.lock_file_path, -1)

        def release(self) -> None:
            super().release()
            tell("build_end", name, -1)
            tell("lock_freed", self.lock_file_path, -1)

    cpp_extension.FileBaton = ObservedBaton  # type: ignore[misc]
    try:
        yield
    finally:
        cpp_extension.FileBaton = plain  # type: ignore[misc]


def _reason(output: str) -> str:
    """The line of a build's output that says why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = ("error:", "not found", "no space left", "permission denied", "no such file", "read-only")
    for line in lines:
        if any(words in line.lower() for words in telling):
            return line[:300]
    return lines[0][:300] if lines else "no reason given"
