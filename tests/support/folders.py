"""Folders that are not what a program hopes for."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own in the place of the folder, with ``--bind`` the folder again; skips if not allowed."""
    source = [str(folder)] if "--bind" in options else ["-t", "tmpfs", "tmpfs"]
    if os.geteuid() or subprocess.run(["mount", *options, *source, str(folder)]).returncode:
        pytest.skip("cannot mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """With what is in it; by a mount for root, whom no permission stops, and by the permissions for everybody else."""
    if not os.geteuid():
        with mounted(folder, "--bind", "-o", "ro"):
            yield
        return
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)
