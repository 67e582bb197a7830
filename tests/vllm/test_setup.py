"""scripts/setup_vllm.py: what fails is one line that says what to do, and the next start begins from nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup_vllm.py"
VENV = """
import os, sys
os.makedirs(folder := os.path.join(sys.argv[1], "bin"))
with open(os.open(os.path.join(folder, "python"), os.O_WRONLY | os.O_CREAT, 0o755), "w") as file:
    file.write(f'#!/bin/sh\\nexec {sys.executable} "$@"\\n')
"""
"""Stands for Python's module venv, which takes seconds to unpack a pip. Its Python has the pip of the tests."""

python_311 = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="vLLM's CPU build is for Python 3.11")


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """A function that starts the set-up with a package index of its own, and no other."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "venv.py").write_text(VENV)

    def start(venv: Path, index: str = "") -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index, "PYTHONPATH": str(modules)}
        return subprocess.Popen(
            [sys.executable, str(SETUP), str(venv)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    return start


def index_at(server: socket.socket) -> str:
    host, port = server.getsockname()
    return f"http://{host}:{port}/simple"


def test_a_folder_without_vllm_that_was_made_by_other_means_is_kept_and_named(start, tmp_path):
    (tmp_path / "precious").touch()
    done = start(tmp_path)
    out, err = done.communicate(timeout=30)
    assert (done.returncode, out) == (2, "") and (tmp_path / "precious").exists()
    assert err == f"setup: {tmp_path} exists and has no vLLM; name another folder: make test-vllm VLLM_VENV=…\n"


def test_an_environment_with_vllm_is_used_as_it_is(start, tmp_path):
    package = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    done = start(tmp_path)
    assert (done.communicate(timeout=30), done.returncode) == (("", ""), 0)


@python_311
def test_without_a_network_one_line_says_so_and_an_unfinished_environment_is_made_anew(start, tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()
    for name in (".unfinished", "of_the_last_start"):
        (venv / name).touch()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens: each connection is refused
        done = start(venv, index_at(closed))
        _, err = done.communicate(timeout=90)
    assert done.returncode == 1 and len(err.splitlines()) == 1, err
    assert "no package index was reached; check the network and PIP_INDEX_URL" in err
    assert (venv / ".unfinished").exists() and not (venv / "of_the_last_start").exists()


@python_311
def test_an_interrupt_is_one_line_and_the_exit_code_of_interrupts(start, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        done = start(tmp_path / "venv", index_at(silent))
        silent.settimeout(60)
        with silent.accept()[0]:  # pip waits for an answer
            time.sleep(0.1)
            os.killpg(done.pid, signal.SIGINT)
            _, err = done.communicate(timeout=30)
    assert done.returncode == 130 and "interrupted; the next make test-vllm removes" in err, err
    assert len(err.splitlines()) == 1, err


def test_a_place_that_cannot_be_written_is_one_line(start, tmp_path):
    (tmp_path / "file").touch()
    done = start(tmp_path / "file" / "venv")
    _, err = done.communicate(timeout=30)
    assert done.returncode in (1, 2) and len(err.splitlines()) == 1 and "file" in err, err
