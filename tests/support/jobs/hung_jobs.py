"""Small torch.distributed jobs, each of which hangs in one known way and uses nothing of this project.

    python tests/support/jobs/hung_jobs.py KIND[,KIND…] FOLDER

One parent imports torch and forks the launcher of each job, which forks three gloo ranks. This takes less time than one
import for each rank. The ranks write FOLDER/KIND/rankN.pid, and rankN.started when they are connected.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.cpp_extension import load_inline
from torch.utils.data import DataLoader, Dataset
from torch.utils.file_baton import FileBaton

NUM_RANKS = 3
DEADLINE_S = 600
COMPILER_S = 240
ODD = 1
"""The rank that differs from the others."""


class Rows(Dataset):
    """Rows of numbers. The data loader's worker that reads row 4 waits for a pipe to which nobody writes."""

    def __init__(self, stuck: bool, folder: Path) -> None:
        self.stuck, self.folder = stuck, folder

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.stuck and index == 4:
            (self.folder / "fifo").open().read()
        return torch.ones(4)


def healthy(rank: int, folder: Path) -> None:
    for step in range(100_000):
        dist.all_reduce(torch.ones(1 << 12))
        time.sleep(0.002)
        (folder / f"steps.{rank}").write_text(str(step))


def uneven_batches(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(nn.Linear(4, 4))
    for _ in range(3 if rank == ODD else 4):
        model(torch.ones(2, 4)).sum().backward()
    dist.barrier()


def swallowed_exception(rank: int, folder: Path) -> None:
    for step in range(8):
        try:
            if rank == ODD and step == 5:
                raise ValueError("bad sample")
            dist.all_reduce(torch.ones(8))
        except ValueError:
            pass
    dist.barrier()


def saves(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == ODD:
        state = {"weight": torch.zeros(1 << 16)}
        while True:
            torch.save(state, folder / "checkpoint.pt")
    dist.all_reduce(torch.ones(8))


def busy(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == ODD:
        search(folder)
    dist.all_reduce(torch.ones(8))


def search(folder: Path) -> int:
    total = 0
    while not (folder / "stop").exists():
        total += sum(range(10_000))
    return total


def build_under_lock(rank: int, folder: Path) -> None:
    """torch's own build of an extension, by a compiler that never ends. The others wait for its lock."""
    shutil.copy("/bin/sh", folder / "cc1plus")
    compiler = folder / "c++"
    # ninja outlives its parent, so the compiler ends by itself
    endless = f'exec timeout {COMPILER_S} {folder}/cc1plus -c "while :; do :; done" $@'
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-c*) {endless};; esac\nexec g++ $@\n')
    compiler.chmod(0o755)
    os.environ["CXX"] = str(compiler)
    dist.barrier()
    load_extension(rank, folder)


def load_extension(rank: int, folder: Path) -> None:
    if rank != ODD:
        while not (folder / "lock").exists():
            time.sleep(0.01)
    load_inline("moe", "int one() { return 1; }", functions=["one"], build_directory=str(folder))


def abandoned_lock(rank: int, folder: Path) -> None:
    """The lock file of a killed build, for which the extension loader of torch before 2.14 waits."""
    lock_file = str(folder / "lock")
    Path(lock_file).touch()
    dist.barrier()
    FileBaton(lock_file).wait()


def dead_peer(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == ODD:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.new_group(list(range(NUM_RANKS)))


def debugger(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == ODD:
        sys.stdin = os.fdopen(os.pipe()[0])
        breakpoint()
    dist.all_reduce(torch.ones(8))


def stuck_loader(rank: int, folder: Path) -> None:
    if rank == ODD:
        os.mkfifo(folder / "fifo")
    dist.barrier()
    for batch in DataLoader(Rows(rank == ODD, folder), batch_size=2, num_workers=1):
        dist.all_reduce(batch)


def ring(rank: int, folder: Path) -> None:
    dist.barrier()
    received = torch.zeros(8)
    dist.recv(received, (rank - 1) % NUM_RANKS)
    dist.send(torch.ones(8), (rank + 1) % NUM_RANKS)


def stopped(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == ODD:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(8))


def crossed_groups(rank: int, folder: Path) -> None:
    inner = dist.new_group(list(range(NUM_RANKS)))
    outer = dist.new_group(list(range(NUM_RANKS)))
    dist.barrier()
    if rank == ODD:
        dist.all_reduce(torch.ones(8), group=outer)
        dist.all_reduce(torch.ones(8), group=inner)
    else:
        dist.all_reduce(torch.ones(8), group=inner)
        dist.all_reduce(torch.ones(8), group=outer)


def slow_file(rank: int, folder: Path) -> None:
    """A file system that does not answer: reading a pipe to which nobody writes blocks in the same way."""
    if rank == ODD:
        os.mkfifo(folder / "config")
    dist.barrier()
    if rank == ODD:
        read_config(folder / "config")
    dist.all_reduce(torch.ones(8))


def read_config(path: Path) -> str:
    return path.read_text()


def two_threads(rank: int, folder: Path) -> None:
    """Two threads of one rank, each of which holds the lock that the other waits for."""
    dist.barrier()
    if rank == ODD:
        first, second = threading.Lock(), threading.Lock()
        with first:
            other = threading.Thread(target=take_both, args=(second, first), daemon=True)
            other.start()
            while not second.locked():
                time.sleep(0.01)
            take_both(second, first)
    dist.all_reduce(torch.ones(8))


def take_both(one: threading.Lock, two: threading.Lock) -> None:
    with one, two:
        pass


def sleeps(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == ODD:
        time.sleep(600)
    dist.all_reduce(torch.ones(8))


def waits_for_child(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == ODD:
        subprocess.run(["sleep", "600"], preexec_fn=die_with_parent, check=False)
    dist.all_reduce(torch.ones(8))


def missing_key(rank: int, folder: Path) -> None:
    """A wait for a key of the store that no rank sets."""
    dist.barrier()
    if rank == ODD:
        dist.distributed_c10d._get_default_store().wait(["plan"], timedelta(seconds=600))
    dist.all_reduce(torch.ones(8))


def collects_garbage(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == ODD:
        rows = [[number] for number in range(200_000)]
        while rows:
            gc.collect()
    dist.all_reduce(torch.ones(8))


def monitored(rank: int, folder: Path) -> None:
    """A barrier with a time limit to which one rank does not come."""
    dist.barrier()
    if rank == ODD:
        dist.all_reduce(torch.ones(8))
    dist.monitored_barrier(timeout=timedelta(seconds=600))


def two_build(rank: int, folder: Path) -> None:
    """Two ranks build, each in its own folder, and the third rank waits."""
    own = folder / f"rank{rank}"
    own.mkdir()
    dist.barrier()
    if rank != ODD:
        build_under_lock_of(own)
    dist.all_reduce(torch.ones(8))


def build_under_lock_of(folder: Path) -> None:
    shutil.copy("/bin/sh", folder / "nvcc")
    subprocess.run(
        ["timeout", str(COMPILER_S), str(folder / "nvcc"), "-c", "while :; do :; done"],
        preexec_fn=die_with_parent,
        check=False,
    )


KINDS = {
    function.__name__: function
    for function in (
        healthy, uneven_batches, swallowed_exception, saves, busy, build_under_lock, abandoned_lock, dead_peer,
        debugger, stuck_loader, ring, stopped, crossed_groups, slow_file, two_threads, sleeps,
        waits_for_child, missing_key, collects_garbage, monitored, two_build,
    )
}  # fmt: skip


def run_rank(kind: str, rank: int, world_size: int, folder: Path) -> None:
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    (folder / f"rank{rank}.started").touch()
    KINDS[kind](rank, folder)
    time.sleep(600)


def die_with_parent() -> None:
    """Let the system end this process with its parent, and in any case after DEADLINE_S."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.alarm(DEADLINE_S)
    if os.getppid() == 1:
        os._exit(1)


def main(kinds: str, root: Path) -> None:
    die_with_parent()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for kind in kinds.split(","):
        (root / kind).mkdir(parents=True)
        if os.fork() == 0:
            die_with_parent()
            launch(kind, root / kind)
            os._exit(0)
    while True:
        time.sleep(600)


def launch(kind: str, folder: Path) -> None:
    for rank in range(NUM_RANKS):
        if os.fork() == 0:
            die_with_parent()
            run_rank(kind, rank, NUM_RANKS, folder)
            os._exit(0)
    for _ in range(NUM_RANKS):
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
