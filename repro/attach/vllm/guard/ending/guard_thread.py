"""The guard's thread in each worker and engine, which ends the process if the main thread does not.

The thread reads in torch's store, through which the processes exchange data, that the ranks must stop. It also sees
which processes have ended. The main thread can be blocked in a collective or in the store, and then cannot end the
process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable

from repro.attach.vllm.guard.ending.peers import Peers, Process, gone, silence
from repro.attach.vllm.guard.ending.stop import Stop
from repro.attach.vllm.guard.meeting.meeting import Meeting
from repro.attach.vllm.guard.schedule.guard import WAIT_S, Guard
from repro.attach.vllm.guard.schedule.post import difference

INTERVAL_S = 0.1
SEARCH_S = 0.5
"""Seconds between two searches for new processes of the server, and between two heartbeats."""

PARENT_FIRST_S = 0.3
"""Seconds that a process waits before it reports that another process has ended.

The parent of the process that has ended does not wait, because only the parent knows the exit code.
"""

SERVER = "worker of rank 0"
"""The process in which the server of torch's store runs."""

MAX_WAIT_CALL_S = 5.0
CHILD_S = 0.5
"""Seconds to wait for the end of a child after a connection to the child broke.

The operating system closes the connections of a process shortly before it reports the end of the process.
"""

LEAVE_S = 0.5
"""Seconds that the process with the server of the store waits before it ends normally.

In this time all other processes can read in the store that this process ends normally.
"""


class GuardThread:
    """The guard's thread of one process.

    The store is torch's store, through which the processes of the server exchange data.

    stop       ends this process when a rank has refused to go on
    connect    returns a connection to the store; None while the address of the store is not known
    processes  the processes that this process announces to the others: first itself; an engine also announces its front
               end
    expected   the names of all processes of the server
    exit_code  takes the id of a process and returns its exit code; None if it still runs or the code is not known
    guard      compares what this worker issues with what the other ranks issue; None if this process is not a worker
    """

    def __init__(
        self,
        stop: Stop,
        connect: Callable[[], Meeting | None],
        processes: list[Process],
        expected: list[str],
        exit_code: Callable[[int], int | None] = lambda pid: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stop = stop
        self.guard: Guard | None = None
        self._connect = connect
        self._meeting: Meeting | None = None
        self._processes = processes
        self._unknown = set(expected) - {processes[0].name}
        self._exit_code = exit_code
        self._clock = clock
        self._peers = Peers(clock)
        self._calls = 0
        self._searched_s = -SEARCH_S
        self._called_s = 0.0
        self._beats = 0
        self._missing_since_s: dict[str, float] = {}
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="repro guard", daemon=True)
        self._thread.start()

    def leave(self, also: Iterable[str] = ()) -> None:
        """Announce that this process ends normally, so that no other process counts it as lost.

        also: names of other processes that this process will end
        """
        if self._leaving.is_set() or self.stop.sentence:
            return
        self._leaving.set()
        with contextlib.suppress(Exception):
            connection = self._connect()
            if connection is not None:
                for name in (*(process.name for process in self._processes), *also):
                    connection.set(f"left/{name}", "1")
                connection.add_call()
                time.sleep(LEAVE_S if self._processes[0].name == SERVER else 0.0)
        self.join()

    def join(self, timeout_s: float = 2.0) -> None:
        """Wait at most ``timeout_s`` seconds until the thread has ended.

        Python would abort if the interpreter exits while the thread uses the store.
        """
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def fail(self, sentence: str) -> None:
        """Announce that an exception ends this process, and stop the ranks that would wait for it.

        If this process is an engine and one of its workers has ended, announce the end of the worker instead, because
        this end caused the exception. With HMR_GUARD=observe, do nothing.

        sentence: what to announce about the exception
        """
        if self.stop.sentence or not self.stop.agrees:
            return
        until = self._clock() + CHILD_S
        while not (lost := self._lost_children()) and self._clock() < until:
            time.sleep(INTERVAL_S / 5)
        sentence = lost or sentence
        with contextlib.suppress(Exception):
            connection = self._connect()
            sentence = connection.refuse(sentence) if connection is not None else sentence
        self.stop.begin(sentence)

    def _lost_children(self) -> str:
        codes = {process: self._exit_code(process.pid) for process in self._peers.ended()}
        return next((gone(process, code) for process, code in codes.items() if code is not None), "")

    def refuse_here(self, sentence: str) -> None:
        """Stop all ranks and raise Refused. With HMR_GUARD=observe, only print the sentence.

        Only the main thread calls this method.

        sentence: why the ranks stop
        """
        if not self.stop.agrees:
            self.stop.observe(sentence)
            return
        connection = self._connect()
        self.stop.begin(connection.refuse(sentence) if connection is not None else sentence)
        raise self.stop.refused()

    def _run(self) -> None:
        while not self._leaving.is_set() or self.stop.sentence:
            try:
                if not self.stop.sentence:  # after a refusal the store may be gone, and torch takes seconds to say so
                    self.look()
            except Exception as error:
                if _is_gone(error):
                    self._without_store(error)
                    return
                self.stop.say(f"the guard's thread failed, and goes on: {type(error).__name__}: {error}")
            if self.stop.due():
                self.stop.leave()
            self._leaving.wait(INTERVAL_S)
        self._peers.close()

    def look(self) -> None:
        """Read torch's store, through which the processes exchange data, and check the other processes, once.

        - If a rank has stopped all ranks, begin to stop this process.
        - If a process has asked for the states of all ranks, and this process is a worker: write the state of its rank
          (such as its last collectives) into the store, and stop all ranks if the states in the store differ.
        - If this process is a worker that has waited in an execution for more than WAIT_S seconds, ask for the states
          of all ranks.
        - If a process has ended without announcing this, or if a host is down, stop all ranks.

        With HMR_GUARD=observe, this method stops nothing, and only prints why it would. Raises torch's DistNetworkError
        if the store does not answer.
        """
        if self._meeting is None:
            self._meeting = self._connect()
            if self._meeting is None:
                return
            for process in self._processes:
                self._meeting.set(f"process/{process.name}", process.text())
        meeting = self._meeting
        refusal, calls = meeting.news()
        if refusal:
            self.stop.begin(refusal)
            return
        if calls != self._calls:
            self._calls = calls
            self._forget_left(meeting, list(self._peers.known))
            self._compare(meeting)
        elif self.guard is not None and self.guard.waits_s() > WAIT_S:
            self._call(meeting, self.guard)
        if self._clock() - self._searched_s >= SEARCH_S:
            self._searched_s = self._clock()
            self._search(meeting)
        self._look_for_ends(meeting)

    # -- where the ranks are ------------------------------------------------------------------------------------------

    def _call(self, meeting: Meeting, guard: Guard) -> None:
        """Write the state of this rank into the store, and ask the other ranks to write theirs.

        Call this when this rank waits. Do nothing if the last such request was a short time ago. The longer this rank
        waits, the less often it asks.
        """
        if self._clock() - self._called_s < min(max(guard.waits_s() / 2, 0.5), MAX_WAIT_CALL_S):
            return
        self._called_s = self._clock()
        meeting.call(guard.post())

    def _compare(self, meeting: Meeting) -> None:
        if self.guard is None:
            return
        meeting.post(self.guard.post())
        self._refuse(difference(meeting.posts(self.guard.members)))

    # -- who is gone --------------------------------------------------------------------------------------------------

    def _search(self, meeting: Meeting) -> None:
        for text in meeting.read(f"process/{name}" for name in sorted(self._unknown)).values() if self._unknown else ():
            process = Process.read(text)
            self._unknown.discard(process.name)
            self._peers.add(process)
        self._beats += 1
        meeting.set(f"beat/{self._processes[0].name}", str(self._beats))
        far = self._peers.far()
        for name, number in meeting.read(f"beat/{name}" for name in far).items() if far else ():
            self._peers.beat(name.partition("/")[2], number)
        silent = self._peers.silent()
        if silent is not None:
            self._refuse(silence(*silent))

    def _look_for_ends(self, meeting: Meeting) -> None:
        for process in self._peers.ended():
            if self._forget_left(meeting, [process.name]):
                continue
            since_s = self._missing_since_s.setdefault(process.name, self._clock())
            code = self._exit_code(process.pid)
            if code is not None or self._clock() - since_s >= PARENT_FIRST_S:
                self._refuse(gone(process, code))
                if not self.stop.agrees:
                    self._peers.forget(process.name)

    def _forget_left(self, meeting: Meeting, names: list[str]) -> bool:
        left = meeting.read(f"left/{name}" for name in names) if names else {}
        for key in left:
            self._peers.forget(key.partition("/")[2])
        return bool(left)

    def _without_store(self, error: Exception) -> None:
        """Stop this process, because torch's store does not answer; with HMR_GUARD=observe only print the reason.

        The store's server is in the worker of rank 0, which has probably ended. Do nothing in these cases:

        - this process is the worker of rank 0
        - this process has announced that it ends normally
        - the worker of rank 0 has announced that it ends normally

        error: the exception of the last call of the store
        """
        until = self._clock() + 2 * PARENT_FIRST_S
        server = self._peers.known.get(SERVER)
        here = self._processes[0].name == SERVER
        while not self.stop.sentence and self._clock() < until and not here:
            if self._leaving.is_set():
                return
            code = self._exit_code(server.pid) if server is not None else None
            if code is not None:
                break
            time.sleep(INTERVAL_S / 2)
        if self._leaving.is_set() or here or self._is_forgotten(server):
            return
        if not self.stop.sentence:
            why = f"rank 0 is gone: the store of its worker does not answer ({type(error).__name__})"
            if server is not None and server in self._peers.ended():
                why = gone(server, self._exit_code(server.pid))
            self._refuse(why)
        while self.stop.sentence and not self.stop.due():
            time.sleep(INTERVAL_S)
        if self.stop.sentence:
            self.stop.leave()

    def _is_forgotten(self, server: Process | None) -> bool:
        return server is not None and not self._peers.watches(server)

    def _refuse(self, sentence: str) -> None:
        if not sentence:
            return
        if not self.stop.agrees:
            self.stop.observe(sentence)
            return
        if self._meeting is not None:
            # if the store is gone, `refuse` fails, and this rank stops with its own sentence
            with contextlib.suppress(RuntimeError):
                sentence = self._meeting.refuse(sentence)
        self.stop.begin(sentence)


def _is_gone(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistNetworkError)


def front_end_of(rank: int) -> Process:
    """Return the front end that started this engine. Call this in an engine: its front end is the parent process.

    rank: the rank of the engine's first worker; the name of the returned process has this rank
    """
    return Process.of(f"front end of rank {rank}", rank, os.getppid())
