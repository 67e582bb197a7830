"""Run Python programs in forks of one process that has imported torch. A program then starts in 0.05 s.

A program has its own variables, sys.path, arguments and output, and `sitecustomize` runs before it. What differs from a
new interpreter: torch is imported already. Start an interpreter where the order of imports matters.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

TORCHRUN = "from torch.distributed.run import main\nmain()"
"""torchrun. The ranks that it starts are interpreters of their own."""


class ProgramServer:
    """The process that forks. The first program starts it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        program: Path | str,
        *arguments: str,
        cwd: Path | str = ".",
        env: Mapping[str, str] = os.environ,
        timeout_s: float = 100,
    ) -> subprocess.CompletedProcess[str]:
        """Run a file, or the text of a program. Processes that it leaves behind in its session are killed."""
        with tempfile.TemporaryDirectory() as folder:
            path, out, err = (Path(folder, name) for name in ("program.py", "out", "err"))
            if isinstance(program, str):
                path.write_text(program)
            else:
                path = program
            command = [str(path), *arguments]
            end = self._ask(json.dumps([command, os.path.abspath(cwd), dict(env), str(out), str(err), timeout_s]))
            printed, failures = out.read_text(), err.read_text()
        assert end != "timeout", f"{command} did not end within {timeout_s} s: {printed}{failures}"
        return subprocess.CompletedProcess(command, int(end), printed, failures)

    def _ask(self, request: str) -> str:
        if self._process is None:
            command = [sys.executable, __file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        except BaseException:  # such as the end of the test's time: the answer must not be taken for the next one
            self._process.kill()
            self._process.wait()
            self._process = None
            raise
        assert answer, "the process that forks has ended"
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()  # it ends when its standard input is closed


def serve() -> None:
    """Run one program for each line of standard input, and print its exit code; "timeout" if it did not end."""
    gc.disable()  # until all is imported: what modules define is no garbage
    import torch  # noqa: F401
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    gc.freeze()  # a garbage collection in a program would write to the shared pages, and so copy them
    gc.enable()
    path = sys.path[1:]  # without the folder of this file
    for line in iter(sys.stdin.readline, ""):
        command, cwd, environment, out, err, timeout_s = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _open(os.devnull, out, err)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = command
            sys.path = [os.path.dirname(command[0]), *filter(None, environment.get("PYTHONPATH", "").split(":")), *path]
            sys.modules.pop("sitecustomize", None)
            with contextlib.suppress(ModuleNotFoundError):
                import sitecustomize  # noqa: F401
            _run(command[0])
        print(_end_of(pid, timeout_s), flush=True)


def _run(path: str) -> None:
    """Run the program and end as an interpreter does, except that no module is torn down: for torch that takes long."""
    code = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # the recorder may have replaced it
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):  # the program may have closed it
            sys.stdout.flush()
    finally:
        os._exit(code)


def _open(*files: str) -> None:
    for descriptor, path in enumerate(files):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)


def _end_of(pid: int, timeout_s: float) -> str:
    until = time.monotonic() + timeout_s
    ended, status = 0, 0
    while not ended and time.monotonic() < until:
        time.sleep(0.005)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
        return "timeout"
    return str(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    serve()
