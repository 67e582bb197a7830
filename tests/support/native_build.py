"""The library of native kernels, built once in a session by a process that runs at the same time as the tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import psutil

_BUILD = "import os; from hybrid_moe_kernels import native; native.prepare(); os._exit(0)"
_END_S = 10


class NativeBuild:
    """A process that builds the library into the cache below HOME. If it does not finish, `native.prepare` builds the
    rest.

    It is not a child of this process, because some tests end or count the children that they find.
    """

    def __init__(self) -> None:
        detached = ["sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", sys.executable, "-c", _BUILD]
        self._process = psutil.Process(int(subprocess.check_output(detached)))

    def end(self) -> None:
        """End the process and its compilers."""
        with contextlib.suppress(psutil.Error):
            self._process.terminate()
            self._process.wait(_END_S)
