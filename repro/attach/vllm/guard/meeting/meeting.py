"""Where the processes of all ranks meet: keys in the store of vLLM's workers, over a separate connection.

    refusal      the sentence with which one rank stopped all; the first one stays
    calls        how often a rank asked all others to post their state
    post/R       the state of rank R
    process/N    which process N is, see :mod:`peers`
    left/N       process N ends normally
    beat/N       a number that process N changes, for processes on other hosts

While vLLM waits in the store, a request of another thread over the same connection would wait, too. So each thread has
its own connection.
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
    """One thread's access to the store. Any method raises RuntimeError if the store is gone."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def of(cls, store: Any) -> Meeting:
        """Connect to the server of this store."""
        import torch.distributed as dist

        return cls(dist.PrefixStore(PREFIX, root_of(store).clone()))

    @classmethod
    def at(cls, host: str, port: int) -> Meeting:
        """Connect to a TCP store."""
        import torch.distributed as dist

        return cls(dist.PrefixStore(PREFIX, dist.TCPStore(host, port, None, False)))

    def prepare(self, ranks: Iterable[int]) -> None:
        """Make the keys that everybody reads. One rank calls it before the vote."""
        for key in ("refusal", *(f"post/{rank}" for rank in ranks)):
            self._store.set(key, "")
        self._store.add("calls", 0)

    def set(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def first(self, key: str, text: str) -> str:
        """Set a key unless it is set. Returns the value that is there then. The text must not be empty."""
        return self._store.compare_set(key, "", text).decode()

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """Return key -> value for the keys that are set."""
        keys = list(keys)
        if self._store.check(keys):
            return {key: text.decode() for key, text in zip(keys, self._store.multi_get(keys), strict=True)}
        return {key: self._store.get(key).decode() for key in keys if self._store.check([key])}

    def refuse(self, sentence: str) -> str:
        """Stop all ranks. Returns the sentence that was published first, by whichever rank."""
        return self.first("refusal", sentence)

    def news(self) -> tuple[str, int]:
        """Return the refusal, "" if there is none, and the number of calls."""
        refusal, calls = self._store.multi_get(["refusal", "calls"])
        return refusal.decode(), int(calls)

    def call(self, post: Post) -> None:
        """Post this rank's state, and ask the others to do the same."""
        self.post(post)
        self.add_call()

    def add_call(self) -> None:
        """Make the lookouts of all processes read the new state."""
        self._store.add("calls", 1)

    def post(self, post: Post) -> None:
        self._store.set(f"post/{post.rank}", post.text())

    def posts(self, ranks: Iterable[int]) -> list[Post]:
        """The states that these ranks posted last."""
        texts = self._store.multi_get([f"post/{rank}" for rank in ranks])
        return [Post.read(text.decode()) for text in texts if text]

    def wait_for(
        self, keys: Iterable[str], deadline_s: float, check: Callable[[], None], clock: Callable[[], float]
    ) -> list[str]:
        """Wait until all keys are set. Returns the keys that are not set at the deadline. ``check`` may raise."""
        missing, until = list(keys), clock() + deadline_s
        while missing := [key for key in missing if not self._store.check([key])]:
            check()
            if clock() >= until:
                return missing
            time.sleep(POLL_S)
        return []


def root_of(store: Any) -> Any:
    """Return the store below torch's prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store
