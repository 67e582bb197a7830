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
    """A file system of its own in the place of the folder; skips where that is not allowed."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """By a mount for root, whom no permission stops, and by the permissions for everybody else."""
    if not os.geteuid():
        with mounted(folder, "-o", "ro"):
            yield
        return
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)
