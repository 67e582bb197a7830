"""The state of a rank in torch's store, and how to find the first difference between the states of all ranks.

Each rank writes its state when the ranks differ or when a rank waits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from repro.attach.vllm.guard.schedule.entry import Entry, entry_of
from repro.verdict.result import list_ranks

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Post:
    """The state of one rank, which the rank writes into torch's store for the other ranks.

    An entry is a collective: (group, operation, layer). Entries are numbered from 0, from the start vote on. An engine
    is the process of vLLM that schedules requests and requests executions of the model.

    first        the number of the first entry in `entries`
    entries      the last entries that the rank has issued
    next         the entry that the rank holds back, because its schedule has another entry in this place; None if the
                 rank holds no entry back
    departed     the number of the last entry that differed from the rank's schedule; -1 if no entry did
    execution    how many executions the rank has begun, of those that its engine requested; 0 if unknown
    counted      how many executions the engine had counted when it requested the rank's last execution; -1 if unknown.
                 Normally this is `execution` - 1
    left_out     the number of the first execution that the engine counted but did not request; 0 if there is none
    questions    how many times the engine has begun to ask the other engines "is anyone unfinished?", and how many of
                 these questions have ended; (0, 0) if unknown
    waits_s      for how many seconds the rank has issued no new entry; 0 if the rank does not run the model
    asks_s       for how many seconds the worker has been idle while its engine waits for the answer to a question; 0 if
                 the engine does not wait for an answer
    """

    rank: int
    first: int
    entries: tuple[Key, ...]
    next: Key | None = None
    departed: int = -1
    execution: int = 0
    counted: int = -1
    left_out: int = 0
    questions: tuple[int, int] = (0, 0)
    waits_s: float = 0.0
    asks_s: float = 0.0

    @property
    def count(self) -> int:
        return self.first + len(self.entries)

    def at(self, number: int) -> Key | None:
        """Return the entry with this number, from `entries` or `next`; None if this state does not have the entry."""
        if number == self.count:
            return self.next
        return self.entries[number - self.first] if self.first <= number < self.count else None

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Post:
        """Read a text that :meth:`text` returned. Raises ValueError, KeyError or TypeError for any other text."""
        fields = json.loads(text)
        fields["entries"] = tuple(tuple(key) for key in fields["entries"])
        fields["next"] = tuple(fields["next"]) if fields["next"] else None
        fields["questions"] = tuple(fields["questions"])
        return cls(**fields)


def difference(posts: Sequence[Post]) -> str:
    """Return a sentence about the first difference between the states of the ranks; "" if there is none."""
    return _left_out(posts) or _entries(posts) or _asks(posts)


def _left_out(posts: Iterable[Post]) -> str:
    for post in posts:
        if post.counted > post.execution - 1:
            return left_out(post.rank, post.left_out or post.execution, post.counted, post.execution - 1)
    return ""


def left_out(rank: int, number: int, counted: int, requested: int) -> str:
    """Return the sentence about an engine that counted an execution, but did not request it from its worker.

    rank: the rank of the engine's first worker; number: the number of that execution, from 1; counted, requested: how
    many executions the engine has counted and requested
    """
    return (
        f"rank {rank} left out execution {number}: its engine counted {counted} executions and requested {requested} "
        f"of its worker, so the other ranks would wait for rank {rank} in their step agreement"
    )


def _entries(posts: Sequence[Post]) -> str:
    for number in range(min(post.first for post in posts), max(post.count for post in posts) + 1):
        sides: dict[Key, list[Post]] = {}
        for post in posts:
            key = post.at(number)
            if key is not None:
                sides.setdefault(key, []).append(post)
        if len(sides) > 1:
            return _sentence(number, sides)
    return ""


def _sentence(number: int, sides: dict[Key, list[Post]]) -> str:
    """Return the sentence about entry ``number``, in which the ranks differ.

    If exactly one of the different entries departs from the agreed schedule, the sentence names the ranks that issued
    this entry. Otherwise the sentence lists which ranks issued which entry.

    sides: a dict from each of the different entries to the states of the ranks that issued this entry
    """
    departed = [key for key, posts in sides.items() if all(post.departed == number for post in posts)]
    if len(departed) != 1:
        parts = [f"{_ranks(posts)} issued {_words(key)}" for key, posts in sides.items()]
        return f"the ranks differ in collective {number}: {', '.join(parts)}"
    (key,) = departed
    others = [f"{_words(other)}, which {_ranks(posts)} issued" for other, posts in sides.items() if other != key]
    verb = "would issue" if all(post.next and post.count == number for post in sides[key]) else "issued"
    held = " (refused before it was issued)" if verb == "would issue" else ""
    return f"{_ranks(sides[key])} {verb} {_words(key)}{held}; the agreed schedule has {' and '.join(others)}"


def _asks(posts: Sequence[Post]) -> str:
    """Return the sentence about a cycle of waits between two engines and their workers; "" if there is no cycle.

    The engine of rank A asks "is anyone unfinished?", and its worker is idle. The worker of rank B waits in a
    collective for the worker of A. The engine of B waits for its worker, so it does not answer the question.
    """
    for asking in posts:
        for waiting in posts:
            ahead = waiting.count + (waiting.next is not None) > asking.count
            unanswered = waiting.questions[1] < asking.questions[0]
            if asking.asks_s > 1 and waiting.waits_s > 1 and ahead and unanswered:
                key = waiting.next or (waiting.entries[-1] if waiting.entries else None)
                return (
                    f'rank {asking.rank} left out an execution: its engine asks "is anyone unfinished?" after '
                    f"{asking.execution} executions, and rank {waiting.rank} waits for it in "
                    f"{_words(key) if key else 'a collective'}"
                )
    return ""


def _words(key: Key) -> str:
    return entry_of(*key).words()


def _ranks(posts: Sequence[Post]) -> str:
    ranks = sorted(post.rank for post in posts)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list_ranks(ranks)}"


def keys_of(entries: Iterable[Entry]) -> tuple[Key, ...]:
    return tuple(entry.key() for entry in entries)
