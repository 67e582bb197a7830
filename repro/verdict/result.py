"""The verdict and its parts, such as the position of each rank and the waits between ranks, and their form as text."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import msgspec

MAX_RANKS = 1 << 20
Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
Count = Annotated[int, msgspec.Meta(ge=-(1 << 62), lt=1 << 62)]
"""An integer from a file that is not trusted. Its limits ensure that the sum of two such integers fits in 64 bits."""

Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e9)]

DAMAGED = "by a damaged witness"
"""The value of `Position.detail` for a rank (state "hidden") whose witness does not match its checksums."""

UNFINISHED = "whose end its witness does not show"
"""The value of `Position.detail` for a rank (state "hidden") whose witness does not show which collectives are over."""


@dataclass(frozen=True, slots=True)
class Position:
    """What one rank does at the moment that is judged.

    state      missing (no witness), hidden (the witness does not show what the rank does), starting, running (outside
               any collective), building (a kernel), locked (waits for a lock), blocked (waits in a collective), done,
               failed or dead
    phase, step    where the program was at the rank's last event; ``step`` is -1 outside a step
    layer, group, seq, op, sizes    the collective in which the rank waits, or waited when it ended; otherwise empty
    detail     depends on the state: the lock, the build, the error message, or what the operating system reports
    since_s    for how many seconds the rank has been in this state
    site       where the program called the collective: "file:line function"
    line       the record of the witness that shows the position: "rank003.wit:38912 event 118"
    """

    rank: Rank
    state: str
    phase: str = ""
    step: Count = -1
    layer: str = ""
    group: str = ""
    seq: Count = 0
    op: str = ""
    sizes: tuple[Count, ...] = ()
    since_s: Seconds = 0.0
    detail: str = ""
    site: str = ""
    line: str = ""

    def words(self) -> str:
        """Return the position as text, to follow a subject such as "ranks 0-5". The verb is plural.

        An example: "wait in dp all_reduce #41 (step 12, layers.0.linear_attn)".
        """
        where = ", ".join(part for part in (self._when(), self.layer) if part)
        where = f" ({where})" if where else ""
        match self.state:
            case "blocked":
                return f"wait in {self.group} {self.op} #{self.seq}{where}"
            case "locked":
                return f"wait for lock {self.detail}{where}"
            case "building":
                return f"build {self.detail}{where}"
            case "running":
                return f"run outside any collective{where}" + (f": {self.detail}" if self.detail else "")
            case "starting":
                return "have not started"
            case "done":
                return "are done"
            case "failed":
                return f"failed{where}: {self.detail}"
            case "dead":
                return f"died in {self.group} {self.op} #{self.seq}{where}" if self.op else f"died{where}"
            case "hidden" if self.op:
                why = self.detail or "a group that the witness does not track"
                return f"wait in {self.group} {self.op} #{self.seq}{where}, {why}"
            case "hidden" if self.detail == UNFINISHED:
                return "left a witness that does not show which collectives are over"
            case "hidden":
                return f"left a {'damaged' if self.detail == DAMAGED else 'torn'} witness"
            case _:
                return "left no witness"

    def _when(self) -> str:
        return f"step {self.step}" if self.step >= 0 else self.phase


class Wait(msgspec.Struct, frozen=True, rename={"awaited": "for"}):
    """Ranks that wait in one collective or for one lock, the ranks for which they wait, and why the wait does not end.

    ranks      the ranks that wait
    waits_in   the collective or the lock: "dp all_reduce #41", "lock experts"
    awaited    the ranks for which they wait; () if they wait for no rank
    why        why the wait does not end: "rank 3 has not issued it", "no process holds it any more"
    """

    ranks: tuple[Rank, ...]
    waits_in: str
    awaited: tuple[Rank, ...]
    why: str = ""

    def words(self) -> str:
        """Return the wait as a sentence: "ranks 0-2 in dp all_reduce #4 wait for 3: rank 3 has not issued it"."""
        text = f"{name_ranks(self.ranks)} {'at' if self.waits_in.startswith('lock ') else 'in'} {self.waits_in}"
        if self.awaited:
            others = list_ranks(set(self.awaited) - set(self.ranks)) or "each other"
            text += f" {'wait' if len(self.ranks) > 1 else 'waits'} for {others}"
        return f"{text}: {self.why}" if self.why else text


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evidence shows about a run.

    verdict            the name of a class of `repro.verdict.classes`
    cause              one of the causes of this class; "" if none is known
    culprits           the ranks that the evidence shows to be the cause; can be empty
    suspects           the ranks that can be the cause, for example because they differ from other ranks or from their
                       own earlier steps; the evidence does not prove it
    ranks              the position of each rank
    first_divergence   the first place where ranks differ: {"sides": [{"ranks", "group", "seq", ...}, ...]}, with one
                       side for each different call or position there. None if no such place is known
    cycle              the waits that form a cycle, each as {"ranks": the ranks that wait, "waits_in": the collective or
                       lock, "for": the ranks for which they wait}
    waits              all waits; those of the cycle come first
    evidence           lines that say what was observed
    confidence         certain; likely (further evidence could change the culprits); or undecided (no culprits)
    quiet_s            seconds from the last event of any rank to the moment that is judged
    """

    verdict: str
    cause: str = ""
    culprits: tuple[int, ...] = ()
    suspects: tuple[int, ...] = ()
    ranks: tuple[Position, ...] = ()
    first_divergence: dict[str, Any] | None = None
    cycle: tuple[dict[str, Any], ...] = ()
    waits: tuple[Wait, ...] = ()
    evidence: tuple[str, ...] = ()
    confidence: str = "certain"
    quiet_s: float = 0.0

    def with_evidence(self, lines: Iterable[str]) -> Verdict:
        """Return a copy of the verdict with these lines added at the end of its evidence."""
        return replace(self, evidence=(*self.evidence, *lines))

    def sentences(self) -> list[str]:
        """Return the positions of all ranks in sentences. Ranks in the same position share a sentence."""
        together: dict[str, list[int]] = {}
        for position in self.ranks:
            together.setdefault(position.words(), []).append(position.rank)
        return [say(ranks, words) for words, ranks in together.items()]

    def sentence(self) -> str:
        """Return the positions of all ranks in one line."""
        return "; ".join(self.sentences())


@dataclass(slots=True)
class Finding:
    """What one rule found: cause, culprits and evidence. `Case.verdict` makes a `Verdict` from a finding.

    The fields mean the same as in `Verdict`.
    """

    cause: str = ""
    culprits: tuple[int, ...] = ()
    suspects: tuple[int, ...] = ()
    confidence: str = "certain"
    first_divergence: dict[str, Any] | None = None
    evidence: list[str] = field(default_factory=list)


MOST_SENTENCES = 16


def shorten(lines: list[str]) -> list[str]:
    """Keep the first MOST_SENTENCES lines. If there are more, add a line that says how many are not shown."""
    more = len(lines) - MOST_SENTENCES
    return [*lines[:MOST_SENTENCES], f"{more} further lines are not shown"] if more > 0 else lines


def list_ranks(ranks: Iterable[int]) -> str:
    """Format ranks as ranges: "0-5", "6,7", "0-2,5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = []
    for first, last in runs:
        parts.append(str(first) if first == last else f"{first},{last}" if last == first + 1 else f"{first}-{last}")
    return ",".join(parts)


def name_ranks(ranks: Collection[int]) -> str:
    """Format ranks with their noun: "rank 3" or "ranks 0-5"."""
    return f"rank{'s' if len(ranks) != 1 else ''} {list_ranks(ranks)}"


_SINGULAR = {
    "wait": "waits", "build": "builds", "run": "runs", "have": "has", "are": "is", "keep": "keeps", "hold": "holds",
    "differ": "differs", "do": "does",
    "work": "works",
}  # fmt: skip


def say(ranks: Collection[int], words: str) -> str:
    """Make a sentence from ranks and words that begin with a plural verb. For one rank, the verb becomes singular.

    say([3], "wait in dp all_reduce #41") -> "rank 3 waits in dp all_reduce #41".
    """
    verb, _, rest = words.partition(" ")
    verb = _SINGULAR.get(verb, verb) if len(ranks) == 1 else verb
    return f"{name_ranks(ranks)} {verb} {rest}".rstrip()
