"""The strict check: before a collective is issued, its members compare what each of them will issue.

The schedule guard compares a rank with its own schedule. The strict check compares the ranks with each other, in
everything that must be equal (operation, layer, agreed sizes, dtype, reduce op, root). So the strict check also detects
collectives that would pair wrongly without a hang, and it does so before any data is changed.

The members compare through a store. For each collective, a rank makes four requests to the store: publish its own
collective, wait for the other members, read their collectives, and delete what the rank itself published earlier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from hybrid_moe_ref.parallel.halt import Halt, ScheduleMismatch
from hybrid_moe_ref.parallel.observer import Collective

ANSWER_INTERVAL = timedelta(milliseconds=500)
LOOK_UP_S = 0.1
KEPT = 2
"""A rank deletes what it published KEPT collectives ago, because every member has read this."""


class StrictComparison:
    """The strict check on one rank: compares each collective with those of the other members before it is issued.

    patience_s  seconds to wait for a member that has not arrived at the collective
    lost        a function. If a member can no longer arrive, for example because its process has ended, it returns
                the error to raise; otherwise None
    """

    def __init__(
        self,
        rank: int,
        store: dist.Store,
        halt: Halt,
        patience_s: float,
        lost: Callable[[], Exception | None],
    ) -> None:
        self._rank = rank
        self._store = dist.PrefixStore("strict", store)
        self._halt = halt
        self._patience_s = patience_s
        self._lost = lost
        self._seq: dict[str, int] = {}

    def check(self, collective: Collective, members: Sequence[int]) -> None:
        """Return as soon as every member is about to issue the same collective.

        members: the global ranks of the collective's group

        Raises ScheduleMismatch on every member if one member is about to issue a different collective, or does not
        arrive within `patience_s` seconds. If a rank stops the job meanwhile, raises the error with which it stopped
        the job. If a member can no longer arrive, raises the error of the function `lost`. (`patience_s` and `lost` are
        arguments of the class.)
        """
        seq = self._seq[collective.group] = self._seq.get(collective.group, 0) + 1
        keys = [self._key(collective.group, seq, rank) for rank in members]
        self._store.set(self._key(collective.group, seq, self._rank), _words(collective))
        self._await(keys, members, collective, seq)
        texts = [text.decode() for text in self._store.multi_get(keys)]
        if len(set(texts)) > 1:
            sides = {side: [r for r, text in zip(members, texts, strict=True) if text == side] for side in texts}
            differences = "; ".join(f"ranks {ranks} {side}" for side, ranks in sides.items())
            raise self._halt.publish(ScheduleMismatch(f"{collective.group} #{seq}: {differences}"))
        if seq > KEPT:
            self._store.delete_key(self._key(collective.group, seq - KEPT, self._rank))

    def _await(self, keys: list[str], members: Sequence[int], collective: Collective, seq: int) -> None:
        since = time.monotonic()
        try:
            # The store answers when the last member arrives. Polling would cost ten times as much.
            self._store.wait(keys, ANSWER_INTERVAL)
            return
        except dist.DistNetworkError:
            raise
        except RuntimeError:  # the wait timed out: DistStoreError from a TCP store, RuntimeError from a file store
            pass
        # A member is late, maybe by minutes. So the store is polled: each further `wait` that times out would log two
        # lines in C++.
        while not self._store.check(keys):
            if error := self._halt.published() or self._lost():
                raise error
            if time.monotonic() - since > self._patience_s:
                absent = [rank for rank, key in zip(members, keys, strict=True) if not self._store.check([key])]
                what = f"{collective.group} #{seq}, {_words(collective)}"
                raise self._halt.publish(ScheduleMismatch(f"ranks {absent} did not arrive at {what}"))
            time.sleep(LOOK_UP_S)

    @staticmethod
    def _key(group: str, seq: int, rank: int) -> str:
        return f"{group}/{seq}/{rank}"


def _words(collective: Collective) -> str:
    parts = [collective.op, f"of {collective.layer}" if collective.layer else "", collective.dtype]
    parts += [collective.reduce_op, f"root {collective.root}" if collective.root >= 0 else ""]
    return " ".join(part for part in (*parts, f"sizes {list(collective.sizes)}") if part)
