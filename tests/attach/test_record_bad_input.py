"""`record` in unusual programs and folders: the program goes on, and a line says what is not recorded."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repro.commands.record import SITE
from repro.trace.knowledge import UNDECLARED
from repro.trace.witness import format as witness_format
from repro.trace.witness.file import read_dir

JOIN = """
import os, sys
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
def join(rank=0, size=2):
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
"""


def run(program: str, folder: Path | str, programs=None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Record a program, in an interpreter of its own unless there is a server of `programs`."""
    env = {**os.environ, "HMR_RECORD": str(folder), "PYTHONPATH": str(SITE), **variables}
    if programs:
        return programs.run(JOIN + program, env=env)
    return subprocess.run([sys.executable, "-c", JOIN + program], env=env, capture_output=True, text=True, timeout=100)


def operations(folder: Path, rank: int = 0) -> list[str]:
    """The operations that a rank issued."""
    witness = read_dir(folder / "events")[0][rank]
    issued = (witness_format.Kind.ENTER, witness_format.Kind.ISSUE)
    return [witness.signature(event.sig).op for event in witness.events() if event.kind in issued]


def test_a_program_that_replaces_functions_of_torch_is_recorded(tmp_path):
    program = """
original, by_name = dist.all_reduce, dist.barrier
def all_reduce(tensor, *args, **options):
    return original(tensor, *args, **options)
dist.all_reduce = dist.distributed_c10d.all_reduce = all_reduce
method = dist.ProcessGroup.broadcast
def broadcast(self, *args, **options):
    return method(self, *args, **options)
dist.ProcessGroup.broadcast = broadcast
join()
dist.all_reduce(torch.ones(2))
by_name()
dist.broadcast(torch.ones(2), 0)
print(dist.all_reduce is all_reduce, dist.ProcessGroup.broadcast is broadcast)
"""
    done = run(program, tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr
    assert operations(tmp_path / "run") == ["all_reduce", "barrier", "broadcast"]


@pytest.mark.full
def test_a_program_that_imported_torch_before_the_recording_is_recorded(tmp_path):
    program = f"""
from torch.distributed import all_reduce
from repro.attach.record import start
start.begin({str(tmp_path / "run")!r})
join()
all_reduce(torch.ones(2))
"""
    done = run(program, "", PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    assert done.returncode == 0, done.stderr
    assert operations(tmp_path / "run") == ["all_reduce"]


@pytest.mark.full
def test_forked_ranks_are_recorded_and_a_forked_helper_of_a_rank_is_not(tmp_path):
    program = """
from multiprocessing import get_context
def rank_of(number):
    join(number)
    dist.all_reduce(torch.ones(2))
    helper = get_context("fork").Process(target=dist.barrier)
    helper.start()
    helper.join()
    dist.all_reduce(torch.ones(2))
for number in range(2):
    child = get_context("fork").Process(target=rank_of, args=(number,))
    child.start()
    child.join()
    print(child.exitcode)
"""
    done = run(program, tmp_path / "run")
    assert done.stdout.split() == ["0", "0"], done.stderr
    assert operations(tmp_path / "run", 0) == operations(tmp_path / "run", 1) == ["all_reduce", "all_reduce"]


def test_what_a_rank_did_is_whole_after_sigkill(programs, tmp_path):
    program = """
join()
for _ in range(1000):
    dist.all_reduce(torch.ones(2))
os.kill(os.getpid(), 9)
"""
    done = run(program, tmp_path / "run", programs)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(operations(tmp_path / "run")) == 1000
    witness = read_dir(tmp_path / "run" / "events")[0][0]
    assert witness.knows == UNDECLARED, "the program declares no steps"
    assert not witness.damaged and witness.last is not None and witness.last.kind == witness_format.Kind.LEAVE


def test_a_folder_that_cannot_be_written_costs_the_recording_and_not_the_program(programs, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("/proc/none", tmp_path / "file"):
        done = run("join()\ndist.all_reduce(torch.ones(2))\nprint('went on')", folder, programs)
        assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
        assert done.stderr.count("this process is not recorded") == 1, done.stderr


@pytest.mark.full
def test_a_full_disk_costs_the_recording_and_not_the_program(tmp_path):
    program = f"""
def full(*_):
    raise OSError({errno.ENOSPC}, "No space left on device")
os.posix_fallocate = full
join()
dist.all_reduce(torch.ones(2))
print("went on")
"""
    done = run(program, tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert "this process is not recorded: [Errno 28] No space left on device" in done.stderr
    assert list((tmp_path / "run" / "events").glob("*.wit")) == []


@pytest.mark.full
def test_a_second_recording_of_the_same_job_in_one_folder_is_refused_by_its_ranks(tmp_path):
    program = "join()\ndist.all_reduce(torch.ones(2))\nprint('went on')"
    first, second = (run(program, tmp_path / "run", MASTER_ADDR="a", MASTER_PORT="1") for _ in range(2))
    other = run(program, tmp_path / "run", MASTER_ADDR="a", MASTER_PORT="2")
    assert [done.stdout for done in (first, second, other)] == ["went on\n"] * 3
    assert "this process is not recorded" not in first.stderr + other.stderr
    assert "already has a writer, process" in second.stderr, second.stderr
    assert operations(tmp_path / "run") == ["all_reduce"]
    assert operations(next((tmp_path / "run" / "jobs").iterdir())) == ["all_reduce"]


@pytest.mark.full
@pytest.mark.parametrize("text", ["", "no library"])
def test_a_library_that_does_not_load_leaves_the_hooks_in_python(tmp_path, text):
    program = "join()\ndist.all_reduce(torch.ones(2))\nprint(type(vars(dist.ProcessGroup)['allreduce']).__name__)"
    listed = subprocess.run(
        [sys.executable, "-c", "from repro.attach.record import compiled; print(compiled.path())"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    library = Path(listed.stdout.strip())
    library.parent.mkdir(parents=True)
    library.write_text(text)
    done = run(program, tmp_path / "run", XDG_CACHE_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "function\n"), done.stderr
    assert operations(tmp_path / "run") == ["all_reduce"]


def test_the_exception_that_ends_a_rank_of_torch_multiprocessing_is_recorded_and_raised_as_it_was(programs, tmp_path):
    program = tmp_path / "job.py"
    program.write_text(
        "import torch, torch.distributed as dist\n"
        "def main(rank, place):\n"
        "    dist.init_process_group('gloo', 'file://' + place, rank=rank, world_size=2)\n"
        "    dist.barrier()\n"
        "    if rank == 1:\n"
        "        raise ValueError('no such layer')\n"
        "if __name__ == '__main__':\n"
        f"    place = {str(tmp_path / 'rendezvous')!r}\n"
        "    torch.multiprocessing.start_processes(main, (place,), nprocs=2, start_method='fork')\n"
    )
    to = tmp_path / "run"
    env = {**os.environ, "HMR_RECORD": str(to), "PYTHONPATH": str(SITE), "GLOO_SOCKET_IFNAME": "lo"}
    done = programs.run(program, env=env)
    assert done.returncode == 1 and "ValueError: no such layer" in done.stderr, done.stderr
    witness = read_dir(to / "events")[0][1]
    (failed,) = [event for event in witness.events() if event.kind == witness_format.Kind.FAILED]
    assert witness.text(failed.sig) == "ValueError: no such layer", done.stderr
