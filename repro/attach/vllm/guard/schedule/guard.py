"""The guard of one worker. It compares the ranks at each step agreement, and learns the schedule of each kind of step.

At each step agreement (C1) a rank adds two rows to the tensor that vLLM all-reduces. The rows have a digest (a 64-bit
hash), which covers the collectives that the rank has issued since the last agreement, the schedules that it has
learned, and how many executions of the model its engine has counted. So all ranks see all digests. If the digests
differ, the ranks compare their last collectives through torch's store, and stop with an error message about the first
difference.

A rank learns one schedule for each kind of step: the collectives that it issued in earlier steps of this kind. If a
rank is about to issue a collective that is not the next one of its schedule, it asks the other ranks to write their
latest collectives into the store. It waits until each of them has issued its collective with the same number, or is
about to issue it. If this is the same collective on all ranks, they go on; otherwise all ranks stop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from repro.attach.vllm.guard.ending.stop import Refused, Stop
from repro.attach.vllm.guard.meeting.board import Board, Field
from repro.attach.vllm.guard.meeting.meeting import POLL_S, Meeting
from repro.attach.vllm.guard.schedule.entry import AGREEMENT, Entry, as_words, entry_of, joined
from repro.attach.vllm.guard.schedule.post import Post, difference, keys_of
from repro.attach.vllm.guard.schedule.stream import Stream

ROWS = 2
"""Number of rows that the guard adds to C1."""

WAIT_S = 1.0
"""A rank that waits in one collective of an execution for this many seconds asks the other ranks for their state."""

EXPLAIN_S = 10.0
"""Seconds for which the ranks look for the difference after an agreement whose digests differ."""

CALL_S = 0.2
T = TypeVar("T")


class Guard:
    """Compares what a worker of vLLM issues with what the other ranks issue, and stops the ranks before they hang.

    members    the ranks of the DP group that issues C1, in the order of C1's columns
    meeting    a connection to torch's store, for the thread that runs the model
    stop       ends this process when a rank has refused to go on
    board      the memory that this rank's engine shares with its workers; None if there is none
    num_ranks  the number of ranks of the server; 0 means the number of ``members``
    """

    def __init__(
        self,
        rank: int,
        members: Sequence[int],
        meeting: Meeting,
        stop: Stop,
        board: Board | None = None,
        num_ranks: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank = rank
        self.members = list(members)
        self.num_ranks = num_ranks or len(self.members)
        self.column = self.members.index(rank)
        self.stream = Stream()
        self.layer = ""
        self.thread = threading.get_ident()
        self.inside = False  # whether a hooked call runs; the calls that it makes are not entries of their own
        self.meeting = meeting
        self.stop = stop
        self._board = board
        self._clock = clock
        self._num_executions = 0
        self._counts = board is not None  # whether the digest covers the engine's count of executions
        self._held: tuple[int, Entry] | None = None  # the entry that waits for the other ranks, and its number
        self._executing = False
        self._idle_since_s = clock()
        self._seen: tuple[int, float] = 0, clock()  # the last known number of entries, and when it was first seen

    # -- the thread that runs the model -------------------------------------------------------------------------------

    def begin_execution(self, requested: bool = True) -> None:
        """Note that the worker begins an execution of the model.

        requested: True if the engine requests and counts such executions; False for those of the server's start
        """
        self._num_executions += requested
        self._seen = self.stream.count, self._clock()
        self._executing = True

    def end_execution(self) -> None:
        self._executing = False
        self._idle_since_s = self._clock()

    def watches(self) -> bool:
        """Whether the guard compares a collective that this thread issues now.

        It does not if another hooked call issues the collective, or if this is not the thread that runs the model.
        """
        return not self.inside and threading.get_ident() == self.thread

    def issue(self, group: str, op: str, call: Callable[[], T]) -> T:
        """Issue a collective by ``call``; return the result of ``call``.

        If the collective is not the next one of the schedule, first wait for the other ranks. If one of them issues
        another collective in place of this one, raise Refused, and do not issue this collective.
        """
        self._admit(entry_of(group, op, self.layer))
        return self._run(call)

    def agree(self, group: str, rows: Any, reduce: Callable[[Any], None]) -> None:
        """Issue a step agreement (C1) with two more rows, by which the ranks compare themselves.

        Raises Refused if the ranks differ.

        rows    vLLM's tensor, int32[any number of rows, ranks], in which this rank has filled its own column; on return
                it has the sum over all ranks
        reduce  all-reduces a tensor in place
        """
        import torch

        entry = entry_of(group, "all_reduce", f"{AGREEMENT} in {self.layer}" if self.layer else AGREEMENT)
        words = as_words(joined(self._digest(), entry.digest))
        self._admit(entry, ends=True)
        more = [[0] * rows.shape[1] for _ in range(ROWS)]
        more[0][self.column], more[1][self.column] = words
        wide = torch.cat([rows, torch.tensor(more, dtype=rows.dtype).to(rows.device, non_blocking=True)])
        self._run(lambda: reduce(wide))
        rows.copy_(wide[:-ROWS])
        *agreed, low, high = wide.tolist()
        if low != [words[0]] * len(low) or high != [words[1]] * len(high):
            self._explain()
        self.stream.agreed(kind_of(agreed))

    def _digest(self) -> int:
        digest = joined(self.stream.digest, self.stream.expected())
        if self._counts and self._executing and self._board is not None:
            digest = joined(digest, self._board.counted_at(self._num_executions) + 1)
        return digest

    def _admit(self, entry: Entry, ends: bool = False) -> None:
        if self.stream.departs(entry, ends) and self.stop.agrees:
            self._confer(entry)
        self.stream.append(entry)

    def _run(self, call: Callable[[], T]) -> T:
        self.inside = True
        try:
            return call()
        except Exception as error:
            self.stop.explain(error)
            raise
        finally:
            self.inside = False

    def _confer(self, entry: Entry) -> None:
        """Wait until all other ranks have issued this entry, or are about to issue it.

        A rank calls this before it issues an entry that is not the next one of its schedule. Raises Refused if a rank
        issues another entry in place of this one.
        """
        number, called_s = self.stream.count, -CALL_S
        self._held = number, entry
        while True:
            self.raise_if_stopped()
            if self._clock() - called_s >= CALL_S:
                called_s = self._clock()
                self.meeting.call(self.post())
            posts = self.meeting.posts(self.members)
            if sentence := difference(posts):
                self.refuse(sentence)
            if len(posts) == len(self.members) and all(post.at(number) == entry.key() for post in posts):
                break
            time.sleep(POLL_S)
        self._held = None

    def _explain(self) -> None:
        """Find the first difference between what the ranks issued, and stop all ranks.

        Every rank calls this after a step agreement whose digests differ. If the ranks find no difference, this rank
        prints so and goes on, and from then on its digests do not cover how many executions its engine has counted:
        possibly only these counts differed.
        """
        until, called_s = self._clock() + EXPLAIN_S, -CALL_S
        posts: list[Post] = []
        while self._clock() < until:
            self.raise_if_stopped()
            if self._clock() - called_s >= CALL_S:
                called_s = self._clock()
                self.meeting.call(self.post())
            posts = self.meeting.posts(self.members)
            if sentence := difference(posts):
                return self.refuse(sentence)
            if len(posts) == len(self.members) and all(post.count >= self.stream.count for post in posts):
                break
            time.sleep(POLL_S)
        self._counts = False
        self.stop.say(
            "the digests of a step agreement differ, but the ranks found no difference in what they issued: from now "
            "on the guard does not compare how many executions the engines counted"
        )

    def refuse(self, sentence: str) -> None:
        """Stop all ranks and raise Refused. With HMR_GUARD=observe, only print the sentence.

        sentence: why the ranks stop
        """
        if not self.stop.agrees:
            self.stop.observe(sentence)
            return
        self.stop.begin(self.meeting.refuse(sentence))
        raise self.stop.refused()

    def fail(self, error: Exception) -> None:
        """Stop the ranks that would wait for this rank, because this rank's model raised ``error``."""
        if not isinstance(error, Refused) and self.stop.agrees and not self.stop.sentence:
            self.stop.begin(self.meeting.refuse(f"rank {self.rank} failed: {type(error).__name__}: {error}"))

    def raise_if_stopped(self) -> None:
        if self.stop.sentence:
            raise self.stop.refused()

    # -- any thread ---------------------------------------------------------------------------------------------------

    def post(self) -> Post:
        """Return the state of this rank, such as its last collectives, with which the other ranks compare theirs."""
        held, board = self._held, self._board
        first, entries = self.stream.last()
        number = first + len(entries)
        post = Post(
            self.rank,
            first,
            keys_of(entries),
            held[1].key() if held is not None and held[0] == number else None,
            self.stream.departed,
            waits_s=self.waits_s(),
        )
        if board is None:
            return post
        questions = board.questions()
        asks = not self._executing and questions[0] > questions[1]
        return replace(
            post,
            execution=self._num_executions,
            counted=board.counted_at(self._num_executions),
            left_out=board[Field.LEFT_OUT],
            questions=questions,
            asks_s=self._clock() - self._idle_since_s if asks else 0.0,
        )

    def waits_s(self) -> float:
        """Return for how many seconds this rank has issued no new entry; 0 if the rank does not run the model."""
        count, since_s = self._seen
        if not self._executing:
            return 0.0
        if count != self.stream.count:
            self._seen = self.stream.count, self._clock()
            return 0.0
        return self._clock() - since_s


def kind_of(rows: Sequence[Sequence[int]]) -> Hashable:
    """Return the kind of a step, which decides its schedule: the graph mode and microbatches on which the ranks agree.

    rows  the result of C1: a row for each quantity, a column for each rank. vLLM 0.20 to 0.33 has 4 rows, its new model
          runner 6 or 7. For any other number of rows the meaning of the rows is unknown, and the kind is None
    """
    if len(rows) not in KIND_ROWS:
        return None
    return tuple(min(rows[row]) for row in KIND_ROWS[len(rows)])


KIND_ROWS = {4: (2, 3), 6: (1, 4), 7: (1, 4)}
"""Number of rows of C1 -> the rows whose minimum over the ranks decides what the ranks run."""
