"""Guarded ranks as threads of this process, with a store in memory and collectives that block like real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from repro.attach.vllm.guard.ending.guard_thread import GuardThread
from repro.attach.vllm.guard.ending.peers import Process
from repro.attach.vllm.guard.ending.stop import Stop
from repro.attach.vllm.guard.meeting.board import Board
from repro.attach.vllm.guard.meeting.meeting import Meeting
from repro.attach.vllm.guard.schedule.guard import Guard

DEADLINE_S = 60.0


class Ranks:
    """``guards[rank]``, and what they print in ``stops[rank]``. Each rank has its guard thread."""

    def __init__(self, num_ranks: int, mode: str) -> None:
        self.num_ranks = num_ranks
        self.store = dist.HashStore()
        self.barriers: dict[str, threading.Barrier] = {}
        self.contributions: dict[str, list[Any]] = {}
        self.lock = threading.Lock()
        self.boards = [Board(bytearray(4096)) for _ in range(num_ranks)]
        self.left: list[list[int]] = [[] for _ in range(num_ranks)]
        meeting = self.meeting()
        meeting.prepare(range(num_ranks))
        self.stops = [Stop(f"rank {rank}", mode == "agree", self.left[rank].append) for rank in range(num_ranks)]
        self.guards = [
            Guard(rank, range(num_ranks), self.meeting(), self.stops[rank], self.boards[rank])
            for rank in range(num_ranks)
        ]
        self.guard_threads = [self._guard_thread(rank) for rank in range(num_ranks)]

    def meeting(self) -> Meeting:
        return Meeting(dist.PrefixStore("hmr_guard", self.store))

    def _guard_thread(self, rank: int) -> GuardThread:
        names = [f"worker of rank {other}" for other in range(self.num_ranks)]
        guard_thread = GuardThread(self.stops[rank], self.meeting, [Process.this(names[rank], rank)], names)
        guard_thread.guard = self.guards[rank]
        guard_thread.start()
        return guard_thread

    def run(self, *programs: Callable[[int, Guard], None]) -> list[BaseException | None]:
        """Run program R as rank R, each in a thread; a single one on all ranks. Returns what each raised."""
        raised: list[BaseException | None] = [None] * self.num_ranks

        def rank_of(rank: int) -> None:
            self.guards[rank].thread = threading.get_ident()
            try:
                (programs[rank] if len(programs) > 1 else programs[0])(rank, self.guards[rank])
            except BaseException as error:
                raised[rank] = error

        threads = [threading.Thread(target=rank_of, args=(rank,), daemon=True) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + DEADLINE_S
        while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
            if all(stop.sentence for stop in self.stops):
                time.sleep(0.3)
                self.end_collectives()
            time.sleep(0.01)
        assert not any(thread.is_alive() for thread in threads), "the ranks hang"
        return raised

    def end_collectives(self) -> None:
        for barrier in list(self.barriers.values()):
            barrier.abort()

    def meet(self, group: str) -> None:
        """A collective over all ranks, in which a rank waits for the others."""
        with self.lock:
            barrier = self.barriers.setdefault(group, threading.Barrier(self.num_ranks))
        try:
            barrier.wait(DEADLINE_S)
        except threading.BrokenBarrierError:
            raise RuntimeError("Connection reset by peer") from None

    def all_reduce(self, rank: int, tensor: Any) -> None:
        with self.lock:
            self.contributions.setdefault("rows", []).append(tensor.clone())
        self.meet("dp.cpu")
        with self.lock:
            total = sum(self.contributions["rows"][-self.num_ranks :])
        self.meet("dp.cpu")
        tensor.copy_(total)

    def agree(self, rank: int, guard: Guard, tokens: int = 1) -> Any:
        """One step agreement of vLLM 0.32; returns its rows."""
        rows = torch.zeros(4, self.num_ranks, dtype=torch.int32)
        rows[:2, rank] = tokens
        guard.agree("dp.cpu", rows, lambda wide: self.all_reduce(rank, wide))
        return rows

    def exchange(self, guard: Guard, op: str, layer: str = "model.layers.0.mlp.experts") -> None:
        guard.layer = layer
        guard.issue("ep", op, lambda: self.meet(f"ep {op}"))
        guard.layer = ""

    def step(self, rank: int, guard: Guard, tokens: int = 1) -> Any:
        """One execution: the agreement, dispatch, combine."""
        guard.begin_execution()
        rows = self.agree(rank, guard, tokens)
        self.exchange(guard, "all_gather_v")
        self.exchange(guard, "reduce_scatter_v")
        guard.end_execution()
        return rows


@pytest.fixture
def ranks():
    """A function that makes guarded ranks: ranks(2), ranks(4, "observe")."""
    made: list[Ranks] = []

    def make(num_ranks: int, mode: str = "agree") -> Ranks:
        made.append(Ranks(num_ranks, mode))
        return made[-1]

    yield make
    for each in made:
        for guard_thread in each.guard_threads:
            guard_thread._leaving.set()
        for stop in each.stops:
            stop.sentence = ""
        each.end_collectives()
        for guard_thread in each.guard_threads:
            guard_thread.join()
