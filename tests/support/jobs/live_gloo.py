"""A job of four gloo ranks that hangs by one of six faults of rank 2, and its recorder dumps of two moments.

    python tests/support/jobs/live_gloo.py FAULT FOLDER

writes FOLDER/{json,pickle}{0,1}/… by torch's own functions: the first dumps when no rank makes another call, the second
dumps some seconds later. The fault "straggler" continues between the two.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

NUM_RANKS, STEPS, LAYERS = 4, 8, 3
FAULTS = ("clean", "skip", "straggler", "extra", "other", "order")
STILL_S, SECOND_LOOK_S, STRAGGLE_S = 1.0, 4.0, 3.5


class Rank:
    def __init__(self, rank: int, fault: str, folder: Path) -> None:
        self.rank, self.fault, self.folder = rank, fault, folder
        self.calls, self.x = 0, torch.ones(8)

    def run(self) -> None:
        store = dist.FileStore(str(self.folder / "store"), NUM_RANKS)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=NUM_RANKS)
        self.second = dist.new_group(list(range(NUM_RANKS)))
        threading.Thread(target=self.dump_and_exit, daemon=True).start()
        for step in range(STEPS):
            self.step(step == STEPS - 2 and self.rank == 2)
        time.sleep(60)

    def step(self, wrong: bool) -> None:
        self.reduce(None)
        if wrong and self.fault == "extra":
            self.reduce(None)
        for layer in range(LAYERS):
            if wrong and layer == 1:
                if self.fault == "skip":
                    continue
                if self.fault == "straggler":
                    time.sleep(STRAGGLE_S)
                if self.fault == "other":
                    self.calls += 1
                    dist.broadcast(self.x, 0, group=self.second)
                    continue
            self.calls += 1
            dist.all_gather([torch.ones(8) for _ in range(NUM_RANKS)], self.x, group=self.second)
        groups = [None, self.second]
        for group in reversed(groups) if wrong and self.fault == "order" else groups:
            self.reduce(group)

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        self.calls += 1
        dist.all_reduce(self.x, group=group)

    def dump_and_exit(self) -> None:
        seen = -1
        while seen != self.calls:
            seen = self.calls
            time.sleep(STILL_S)
        self.dump(0)
        time.sleep(SECOND_LOOK_S)
        self.dump(1)
        (self.folder / f"done_{self.rank}").touch()
        # a rank that leaves early would end the waits of the others
        while len(list(self.folder.glob("done_*"))) < NUM_RANKS:
            time.sleep(0.05)
        os._exit(0)

    def dump(self, look: int) -> None:
        from torch._C._distributed_c10d import _dump_fr_trace, _dump_fr_trace_json

        text = _dump_fr_trace_json(True, False)
        data = text if isinstance(text, bytes) else text.encode()
        (self.folder / f"json{look}" / f"rank_{self.rank}.json").write_bytes(data)
        (self.folder / f"pickle{look}" / f"trace_rank_{self.rank}").write_bytes(_dump_fr_trace(True, True, False))


def main(fault: str, folder: Path) -> None:
    for name in ("json0", "json1", "pickle0", "pickle1"):
        (folder / name).mkdir(parents=True)
    pids = []
    for rank in range(NUM_RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                Rank(rank, fault, folder).run()
            finally:
                os._exit(1)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
