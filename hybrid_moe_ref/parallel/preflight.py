"""The strict check: before a collective is issued, all its members compare through the store what they are about to do.

Where the schedule guard holds a rank to its own plan, this holds the ranks to each other, in everything that must be
equal: operation, layer, agreed sizes, dtype, reduce op and root. So it also sees what would not hang but pair wrongly,
and it sees it before any data is touched. The price is four requests to the store for every collective:
to publish what comes, to wait for the others, to read what they published, and to delete what was published before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from hybrid_moe_ref.parallel.guard import Halt, ScheduleMismatch
from hybrid_moe_ref.parallel.observer import Collective

ANSWER_INTERVAL = timedelta(milliseconds=500)
LOOK_UP_S = 0.1
KEPT = 2
"""A rank deletes what it published so many collectives ago: by then every member has read it."""


class StorePreflight:
    """One rank's side of the comparison.

    patience_s  how long a member may be missing before it is called absent: as long as a collective may take
    lost        why it is no use to wait for the others, if it is none
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
        self._store = dist.PrefixStore("preflight", store)
        self._halt = halt
        self._patience_s = patience_s
        self._lost = lost
        self._seq: dict[str, int] = {}

    def check(self, collective: Collective, members: Sequence[int]) -> None:
        """Return when every member is about to issue the same.

        Raises ScheduleMismatch, on every member, when one is not or does not come.
        """
        seq = self._seq[collective.group] = self._seq.get(collective.group, 0) + 1
        keys = [self._key(collective.group, seq, rank) for rank in members]
        self._store.set(self._key(collective.group, seq, self._rank), _words(collective))
        self._await(keys, members, collective, seq)
        texts = [text.decode() for text in self._store.multi_get(keys)]
        if len(set(texts)) > 1:
            sides = {side: [r for r, text in zip(members, texts, strict=True) if text == side] for side in texts}
            differences = "; ".join(f"ranks {ranks} {side}" for side, ranks in sides.items())
            raise self._halt.tell(ScheduleMismatch(f"{collective.group} #{seq}: {differences}"))
        if seq > KEPT:
            self._store.delete_key(self._key(collective.group, seq - KEPT, self._rank))

    def _await(self, keys: list[str], members: Sequence[int], collective: Collective, seq: int) -> None:
        since = time.monotonic()
        try:
            # The store answers when the last member comes; asking it again and again costs ten times as much.
            self._store.wait(keys, ANSWER_INTERVAL)
            return
        except dist.DistNetworkError:
            raise
        except RuntimeError:  # a DistStoreError over TCP, a plain one over a file: not all are there yet
            pass
        # A member is late, maybe by minutes. Another `wait` that ends in vain would log two lines of C++ each time.
        while not self._store.check(keys):
            if error := self._halt.heard() or self._lost():
                raise error
            if time.monotonic() - since > self._patience_s:
                absent = [rank for rank, key in zip(members, keys, strict=True) if not self._store.check([key])]
                what = f"{collective.group} #{seq}, {_words(collective)}"
                raise self._halt.tell(ScheduleMismatch(f"ranks {absent} did not come to {what}"))
            time.sleep(LOOK_UP_S)

    @staticmethod
    def _key(group: str, seq: int, rank: int) -> str:
        return f"{group}/{seq}/{rank}"


def _words(collective: Collective) -> str:
    parts = [collective.op, f"of {collective.layer}" if collective.layer else "", collective.dtype]
    parts += [collective.reduce_op, f"root {collective.root}" if collective.root >= 0 else ""]
    return " ".join(part for part in (*parts, f"sizes {list(collective.sizes)}") if part)
