"""Folders in which a program cannot work normally."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount a new file system at the folder; with ``--bind``, the folder itself.

    Skips the test if that is not allowed.
    """
    source = [str(folder)] if "--bind" in options else ["-t", "tmpfs", "tmpfs"]
    if os.geteuid() or subprocess.run(["mount", *options, *source, str(folder)]).returncode:
        pytest.skip("cannot mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, with its content: by a mount for root, whom permissions do not stop; else by
    permissions.
    """
    if not os.geteuid():
        with mounted(folder, "--bind", "-o", "ro"):
            yield
        return
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)
