"""How the native library comes to be: found, built, waited for, and what is left when any of it fails.

Compilers here are scripts, or compile next to nothing; the kernels themselves are for test_native.py.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hybrid_moe_kernels import build_lock, native, registry
from hybrid_moe_kernels.build_lock import BuildLock
from hybrid_moe_kernels.extension import BuildFailed

from hybrid_moe_ref.__main__ import main

BROKEN = 'echo "x.cpp:1: error: broken"; exit 1'


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch) -> None:
    """As in a process that has not prepared anything."""
    for name, value in {"_library": None, "_error": "", "_failed": None}.items():
        monkeypatch.setattr(native, name, value)


def script(folder: Path, body: str) -> str:
    """A compiler that knows its version, and says each other call in the file `calls`."""
    path = folder / "g++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\necho . >> {folder}/calls\n{body}\n')
    path.chmod(0o755)
    return str(path)


def need_build_tools() -> None:
    if lack := native.cannot_build():
        pytest.skip(f"native kernels: {lack}")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HMR_NATIVE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_empty_folder_variable_counts_as_not_set(monkeypatch) -> None:
    monkeypatch.setenv("HMR_NATIVE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert native.folder() == Path("/caches/hybrid_moe_kernels")


def test_a_library_that_is_there_needs_no_compiler(native_library, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.prepare() == ""


def test_an_instruction_set_that_is_not_here_is_one_line(native_library, monkeypatch) -> None:
    assert set(native_library.instruction_sets()) <= set(native.INSTRUCTION_SETS)
    monkeypatch.setattr(native, "INSTRUCTION_SETS", (*native.INSTRUCTION_SETS, "avx10"))
    monkeypatch.setenv("HMR_NATIVE_ISA", "avx10")
    assert native.prepare().startswith("HMR_NATIVE_ISA: this processor does not have 'avx10', only generic")


def test_an_unknown_instruction_set_is_refused_before_a_build(cache, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HMR_NATIVE_ISA", "bogus")
    monkeypatch.setattr(registry, "_choice", registry.choice())
    assert main(["generate", "tiny", "--tokens", "1", "--max-new-tokens", "1", "--kernels", "native"]) == 2
    text = capsys.readouterr().err
    assert text == "hybrid_moe_ref: HMR_NATIVE_ISA: 'bogus' is not one of generic, avx2, avx512bf16, amx\n"
    assert not cache.exists()
    assert main(["generate", "tiny", "--tokens", "1", "--max-new-tokens", "1", "--kernels", "torch"]) == 0


def test_a_failed_build_is_not_tried_again(tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, BROKEN))
    need_build_tools()
    assert native.prepare() == "the build failed: x.cpp:1: error: broken"
    calls = (tmp_path / "calls").read_text()
    assert native.prepare() == "the build failed: x.cpp:1: error: broken"
    assert (tmp_path / "calls").read_text() == calls
    assert list(cache.iterdir()) == []


def test_a_second_build_in_one_process_works_with_the_ninja_beside_this_python(tmp_path, monkeypatch) -> None:
    need_build_tools()
    beside_this_python = Path(sys.executable).with_name("ninja")
    real = beside_this_python if beside_this_python.exists() else shutil.which("ninja")
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "small.cpp").write_text("int small = 1;\n")
    monkeypatch.setattr(native, "_HERE", tmp_path)
    beside = tmp_path / "bin" / "ninja"
    beside.parent.mkdir()
    beside.write_text(f'#!/bin/sh\necho . >> {tmp_path}/asked\nexec {real} "$@"\n')
    beside.chmod(0o755)
    beside.with_name("python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(beside.with_name("python")))
    before = os.environ["PATH"]
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        native.build(folder / "built.so")
        assert [path.name for path in folder.iterdir()] == ["built.so"]
    assert os.environ["PATH"] == before and (tmp_path / "asked").exists()


def test_what_a_killed_build_left_is_swept_by_the_next(tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, "exec sleep 2"))
    need_build_tools()
    child = os.fork()
    if child == 0:
        native.prepare()
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (tmp_path / "calls").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left, lock = sorted(cache.iterdir())
    assert lock.name == ".lock" and f"+{child}+" in left.name
    monkeypatch.setenv("CXX", script(tmp_path, BROKEN))
    assert native.prepare() == "the build failed: x.cpp:1: error: broken"
    assert list(cache.iterdir()) == []


def test_who_waits_says_for_whom_and_not_for_ever(cache, monkeypatch, caplog) -> None:
    """By a clock that only a pause advances."""
    cache.mkdir()
    monkeypatch.setattr(native, "LOCK_LIMIT_S", 0.3)
    now_s, ticks = [100.0], []

    def sleep(seconds: float) -> None:
        now_s[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now_s[0], sleep=sleep, time=time.time)
    with BuildLock(cache / ".lock"):
        monkeypatch.setattr(build_lock, "time", clock)
        reason = native.prepare(lambda: ticks.append(now_s[0]))
    assert reason.startswith(f"{cache}/.lock is held by pid {os.getpid()} on ") and len(ticks) > 5
    (line,) = caplog.messages
    assert line == f"kernels: native: waiting for process {os.getpid()}, which builds in {cache}"


def test_a_builder_sends_heartbeats_and_raises_what_the_build_raised(cache, monkeypatch) -> None:
    def fail(target: Path) -> None:
        assert two_ticks.wait(60)
        raise BuildFailed("no")

    monkeypatch.setattr(native, "build", fail)
    beats: list[int] = []
    monkeypatch.setattr(BuildLock, "beat", lambda lock: beats.append(1))
    ticks: list[int] = []
    two_ticks = threading.Event()

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            two_ticks.set()

    assert native.prepare(tick) == "no"
    assert len(ticks) >= 2 and len(beats) == len(ticks)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=300
    )


CALL = """
import torch
from hybrid_moe_kernels import norm, registry
registry.prepare()
print(round(norm.rms_norm(torch.ones(2, 4), torch.zeros(4), 1e-6).sum().item()), registry.table()["norm.rms_norm"])
"""


def test_without_a_compiler_torch_runs_and_one_line_says_so(programs, tmp_path) -> None:
    lacking = {"HMR_KERNELS": "native", "HMR_NATIVE_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    done = programs.run(CALL, env=os.environ | lacking)
    assert (done.returncode, done.stdout) == (0, "8 torch\n"), done.stderr
    assert done.stderr.count("\n") == 1 and "there is no C++ compiler no-such-compiler" in done.stderr


def test_without_pythons_headers_nothing_is_compiled_and_one_line_says_so(tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    monkeypatch.setenv("CXX", script(tmp_path, BROKEN))
    assert native.prepare().startswith(f"Python's headers are not installed: there is no {tmp_path}/include/Python.h")
    assert list(cache.iterdir()) == [] and not (tmp_path / "calls").exists()


@pytest.mark.full
def test_a_failed_build_leaves_nothing_behind(tmp_path) -> None:
    need_build_tools()
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho "x.cpp:1: error: broken"\nexit 1\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    done = run_python(CALL, HMR_KERNELS="native", HMR_NATIVE_DIR=str(cache), CXX=str(compiler))
    assert (done.returncode, done.stdout) == (0, "8 torch\n"), done.stderr
    assert "kernels: native: the build failed: x.cpp:1: error: broken; torch runs instead" in done.stderr
    assert done.stderr.count("kernels:") == 1 and list(cache.iterdir()) == []


@pytest.mark.full
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86")
def test_products_by_amx_are_right_where_its_instructions_are_emulated(tmp_path: Path) -> None:
    """With the address sanitizer: what is read or written beyond rows ends the program."""
    need_build_tools()
    compiler = os.environ.get("CXX", "c++")
    source = Path(__file__).resolve().parents[1] / "support" / "amx_emulated.cpp"
    program = tmp_path / "amx_emulated"
    flags = [
        "-O1",
        "-std=c++20",
        "-fopenmp",
        "-Wno-psabi",
        "-fsanitize=address,undefined",
        f"-I{Path(native.__file__).parent}",
    ]
    subprocess.run([compiler, *flags, source, "-o", program], check=True, capture_output=True, text=True)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "200 products\n"), run.stdout + run.stderr
