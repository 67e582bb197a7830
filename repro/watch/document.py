"""verdict.json: its type, its reader, and the conversion from a verdict.

Every program that writes or reads a verdict.json uses the type `Document`. Some fields may be empty: only a run of the
lab has an expected verdict, and `watcher` is set only if a watcher followed the run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec

from repro.store.schema import read_typed, typed
from repro.trace.witness.format import Identity
from repro.verdict import Verdict
from repro.verdict.classes import CLASSES
from repro.verdict.facts import Facts
from repro.verdict.result import MAX_RANKS, Count, Position, Rank, Seconds, Wait
from repro.watch.look import Look

SCHEMA_VERSION = 1


class Side(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ranks that did the same at the place where ranks first differ.

    Either these ranks issued the same call, or they are in the same collective, layer and step, at the same call site.

    seq         the sequence number of the collective in its group
    site        the line of the program that issued the collective: "file:line function"
    sizes, dtype, reduce_op, root   the arguments of the call; None if it is only known where the ranks are
    planned     for culprits that left their declared schedule, the collective that the schedule has here, such as
                "ep all_gather_v of layers.0.moe"; None for all other ranks
    conforms    False for culprits that left their declared schedule; None for all other ranks
    """

    ranks: tuple[Rank, ...]
    group: str
    seq: Count
    op: str
    layer: str
    step: Count
    site: str
    sizes: tuple[Count, ...] | None = None
    dtype: str | None = None
    reduce_op: str | None = None
    root: Count | None = None
    planned: str | None = None
    conforms: bool | None = None


class Divergence(msgspec.Struct, frozen=True):
    """The first place where ranks differ. Each `Side` is a set of ranks that did the same there."""

    sides: tuple[Side, ...]


class Expectation(msgspec.Struct, frozen=True, omit_defaults=True):
    """The verdict that a scenario of the lab expects for its run.

    A field that is None is not checked, except `cause`: if `cause` is None, the verdict must have no cause.

    step, layer   where every culprit must be; if the verdict has no culprit, where every rank must be
    planned       the planned collective at which the culprits left their schedule: "ep all_gather_v of layers.0.moe"
    error         the type of the exception that every living rank must raise
    or_else       another verdict that is accepted too
    """

    verdict: str
    cause: str | None
    step: Count | None = None
    layer: str | None = None
    planned: str | None = None
    error: str | None = None
    culprits: tuple[Rank, ...] | None = None
    suspects: tuple[Rank, ...] | None = None
    or_else: Expectation | None = None


class Watcher(msgspec.Struct, frozen=True):
    """The watcher's host and pid namespace, and the time at which the watcher last read the witnesses.

    A later judgement of the run needs these values to compute how long before that time each event happened.

    wall_offset_ns   the wall clock minus the monotonic clock of the watcher's host
    now_ns           the time on this monotonic clock
    """

    hostname: str
    boot_id: str
    pid_namespace: Count
    wall_offset_ns: Count
    now_ns: Count

    @classmethod
    def of(cls, look: Look) -> Self:
        here = look.watcher
        return cls(here.hostname, here.boot_id, here.pid_namespace, here.wall_offset_ns, look.now_ns)

    def identity(self) -> Identity:
        """Return the watcher's host and pid namespace in the form in which a witness describes its writer."""
        return Identity(
            0,
            1,
            hostname=self.hostname,
            boot_id=self.boot_id,
            pid_namespace=self.pid_namespace,
            wall_offset_ns=self.wall_offset_ns,
        )


class Progress(msgspec.Struct, frozen=True):
    """How much a rank had recorded when it was judged: the number of its events, and the time of its last heartbeat.

    heartbeat_ns   a time on the monotonic clock of the rank's host
    """

    num_events: Count
    heartbeat_ns: Count


class Durations(msgspec.Struct, frozen=True):
    """How long the watcher took, in seconds.

    stall_to_verdict   from the last event of any rank to the verdict
    total              from the start of the watch to the verdict
    """

    stall_to_verdict: Seconds = 0.0
    total: Seconds = 0.0


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """The content of verdict.json.

    schema_version       the version of this format
    scenario ... seed    the settings of the run; `backend` is the one of torch.distributed, such as gloo
    verdict              a class of `repro.verdict.classes`; "" if the run is not decided
    cause                a cause of this class; None if there is none
    culprits ... quiet_s the fields of :class:`repro.verdict.Verdict` with the same names
    sentences            what each rank does: one sentence for all ranks in the same position
    expected             the verdict that the lab's scenario expects; None outside the lab
    matches_expected     whether the verdict is the expected one; None outside the lab
    watcher              the process that judged the run; None if the file names no watcher
    system               the facts that were judged together with the witnesses
    notes                other observations of the watcher, in sentences
    judged               rank -> how much the rank's witness contained when the run was judged. The rank may have
                         recorded more since then
    interrupted          whether the user ended the run before there was a final verdict
    ended_by             a sentence about the signal that ended the launcher, and so the run; "" if there was no signal
    skipped              why a run of the lab did not take place; "" if the run took place
    """

    schema_version: int = SCHEMA_VERSION
    scenario: str = ""
    variant: str = ""
    backend: str = ""
    num_ranks: Annotated[int, msgspec.Meta(ge=0, le=MAX_RANKS)] = 0
    seed: Count = 0
    verdict: str
    cause: str | None = None
    culprits: tuple[Rank, ...]
    suspects: tuple[Rank, ...] = ()
    ranks: tuple[Position, ...] = ()
    first_divergence: Divergence | None = None
    cycle: tuple[Wait, ...] = ()
    waits: tuple[Wait, ...] = ()
    evidence: tuple[str, ...]
    confidence: str
    quiet_s: Seconds
    sentences: tuple[str, ...] = ()
    expected: Expectation | None = None
    matches_expected: bool | None = None
    watcher: Watcher | None = None
    system: Facts
    notes: tuple[str, ...] = ()
    judged: dict[Rank, Progress] = {}
    interrupted: bool = False
    ended_by: str = ""
    seconds: Durations
    skipped: str = ""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"verdict.json has version {self.schema_version}: this release reads {SCHEMA_VERSION}")
        if self.verdict and self.verdict not in CLASSES:
            raise ValueError(f"{self.verdict[:40]!r} is not a verdict class")
        if not self.waits:  # files of older versions have `cycle`, but not `waits`
            msgspec.structs.force_setattr(self, "waits", self.cycle)

    @property
    def sides(self) -> tuple[Side, ...]:
        """Return the sets of ranks that did the same at the place where ranks first differ; () if no ranks differ."""
        return self.first_divergence.sides if self.first_divergence else ()

    def look(self) -> Look | None:
        """Return what the watcher knew when it judged the run, without witnesses; None if no watcher is named."""
        if self.watcher is None:
            return None
        return Look(self.watcher.identity(), self.watcher.now_ns, facts=self.system, notes=self.notes)


def describe(verdict: Verdict, **more: Any) -> Document:
    """Make the content of verdict.json from a verdict. ``more`` sets fields that a verdict lacks, such as `seed`."""
    return Document(
        verdict=verdict.verdict,
        cause=verdict.cause or None,
        culprits=verdict.culprits,
        suspects=verdict.suspects,
        ranks=tuple(dataclasses.replace(at, since_s=round(at.since_s, 3)) for at in verdict.ranks),
        first_divergence=typed(first, Divergence, "first_divergence") if (first := verdict.first_divergence) else None,
        cycle=typed(verdict.cycle, tuple[Wait, ...], "cycle"),
        waits=verdict.waits,
        evidence=verdict.evidence,
        confidence=verdict.confidence,
        quiet_s=round(verdict.quiet_s, 3),
        sentences=tuple(verdict.sentences()),
        **{"system": Facts(), "seconds": Durations(), **more},
    )


def progress_of(look: Look) -> dict[int, Progress]:
    """Return, for each rank with a witness, how much the rank had recorded when the watcher read it for ``look``."""
    return {
        rank: Progress(witness.num_events, witness.heartbeat_ns) for rank, witness in sorted(look.witnesses.items())
    }


def undecided(**run: Any) -> Document:
    """Make the verdict.json of a run without a verdict. ``run`` sets scenario, variant, backend, num_ranks and seed."""
    return describe(Verdict("", confidence=""), **run)


def read_document(path: Path) -> Document:
    """Read a verdict.json. Raises OSError, or DamagedFile with the file, the field and the problem."""
    return read_typed(path, Document)
