"""The keys in torch's store by which the processes of all ranks exchange data.

    refusal         the sentence with which a rank stops all ranks; a later refusal does not replace it
    calls           how many times a process has asked all others to read the store and to write their state
    post/R          the state of rank R, such as its last collectives
    process/N       pid, start time and host of the process with the name N, see :mod:`peers`
    left/N          set if process N ends normally
    beat/N          the heartbeat of process N, a number that N changes twice a second; processes on other hosts read it
    TOPIC/R         the ballot of rank R in the vote TOPIC, see :mod:`vote`
    TOPIC/decision  the decision of this vote

Each thread of the guard has its own connection to the store. vLLM's connection cannot be shared: while vLLM waits for a
key, which can take long, every other request over this connection waits, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from repro.attach.vllm.guard.schedule.post import Post

if TYPE_CHECKING:
    from torch.distributed import Store

PREFIX = "hmr_guard"
POLL_S = 0.02


class Meeting:
    """One thread's connection to torch's store, through which the processes of a vLLM server exchange data.

    Each method raises RuntimeError if the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def of(cls, store: Any) -> Meeting:
        """Open a further connection to the server of ``store``, which is the store that vLLM's worker uses."""
        import torch.distributed as dist

        return cls(dist.PrefixStore(PREFIX, root_of(store).clone()))

    @classmethod
    def at(cls, host: str, port: int) -> Meeting:
        """Connect to the TCP store at this address. An engine calls this, because it has no store of its own."""
        import torch.distributed as dist

        return cls(dist.PrefixStore(PREFIX, dist.TCPStore(host, port, None, False)))

    def prepare(self, ranks: Iterable[int]) -> None:
        """Create the keys that all processes read. Rank 0 calls this before the start vote. ranks: all ranks."""
        for key in ("refusal", *(f"post/{rank}" for rank in ranks)):
            self._store.set(key, "")
        self._store.add("calls", 0)

    def set(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def first(self, key: str, text: str) -> str:
        """Set a key, unless it already has a value. Returns the key's value after that. ``text`` must not be empty."""
        return self._store.compare_set(key, "", text).decode()

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """Return a dict from key to value, with those of ``keys`` that are set."""
        keys = list(keys)
        if self._store.check(keys):
            return {key: text.decode() for key, text in zip(keys, self._store.multi_get(keys), strict=True)}
        return {key: self._store.get(key).decode() for key in keys if self._store.check([key])}

    def refuse(self, sentence: str) -> str:
        """Stop all ranks with this sentence, unless another rank has stopped them before.

        Returns the sentence with which the ranks stop: that of the first rank that refused.
        """
        return self.first("refusal", sentence)

    def news(self) -> tuple[str, int]:
        """Return the sentence with which a rank has stopped all ranks, and the number of calls of `add_call`.

        The sentence is "" if no rank has stopped them. The number counts the calls of all processes together.
        """
        refusal, calls = self._store.multi_get(["refusal", "calls"])
        return refusal.decode(), int(calls)

    def call(self, post: Post) -> None:
        """Write the state of this rank (``post``) into the store, and ask all other ranks to write theirs."""
        self.post(post)
        self.add_call()

    def add_call(self) -> None:
        """Ask the guard threads of all processes to read the store soon.

        Each thread then reads which processes have ended normally. The threads of workers also write the state of their
        rank into the store, and compare the states of all ranks.
        """
        self._store.add("calls", 1)

    def post(self, post: Post) -> None:
        self._store.set(f"post/{post.rank}", post.text())

    def posts(self, ranks: Iterable[int]) -> list[Post]:
        """Return the state that each of these ranks last wrote into the store. A rank that wrote none is left out."""
        texts = self._store.multi_get([f"post/{rank}" for rank in ranks])
        return [Post.read(text.decode()) for text in texts if text]

    def wait_for(
        self, keys: Iterable[str], deadline_s: float, check: Callable[[], None], clock: Callable[[], float]
    ) -> list[str]:
        """Wait at most ``deadline_s`` seconds until all keys are set. Returns the keys that are still not set.

        check: is called again and again during the wait; it can raise an exception to end the wait
        clock: returns the time in seconds
        """
        missing, until = list(keys), clock() + deadline_s
        while missing := [key for key in missing if not self._store.check([key])]:
            check()
            if clock() >= until:
                return missing
            time.sleep(POLL_S)
        return []


def root_of(store: Any) -> Any:
    """Return the TCP store itself, without torch's PrefixStores around it."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store
