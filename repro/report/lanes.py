"""Convert a rank's witness to time spans (phases, steps, collectives, locks, builds) on a clock that all ranks share.

A lane is the row of one rank in the timeline, with all its time spans. It keeps five numbers for each span, so that
hundreds of ranks fit into memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from repro.store.text import short_site
from repro.trace.witness.file import Witness
from repro.trace.witness.format import Event, Kind

OPEN = -1
"""The end time of a span that never ended."""

_MOST_SIZES = 16


class Label(NamedTuple):
    """The text of a time span, in parts.

    kind   phase, step, call, async (an asynchronous call), lock (the rank waits for a lock), held (the rank holds a
           lock), build or failed
    name   the name of the phase, step, lock or build; for a collective, its operation
    note   further details, such as the sizes of a collective
    site   the place in the code that called a collective: "file:line function"
    """

    kind: str
    name: str
    group: str = ""
    layer: str = ""
    note: str = ""
    site: str = ""


class Span(NamedTuple):
    """One time span of a rank: a phase, a step, a collective, a wait for a lock, a held lock, a build, or a failure.

    Times are in ns of the clock that all ranks share (`SharedClock`). If the span never ended, ``end_ns`` is OPEN (-1).

    label  index of the span's text in `Labels.table`
    seq    sequence number of the collective in its group; 0 for other spans
    step   number of the step to which the span belongs; -1 if there is none
    """

    start_ns: int
    end_ns: int
    label: int
    seq: int
    step: int


class Labels:
    """The distinct texts of the time spans of all ranks. A span refers to its text by the index in ``table``."""

    def __init__(self) -> None:
        self.table: list[Label] = []
        self._numbers: dict[Label, int] = {}

    def number(self, label: Label) -> int:
        number = self._numbers.get(label)
        if number is None:
            number = self._numbers[label] = len(self.table)
            self.table.append(label)
        return number


@dataclass(slots=True)
class Lane:
    """The time spans of one rank, such as steps and collectives, in one row of the timeline.

    starts ... steps   a column for each field of `Span`, with one number for each span, ordered by their begin
    groups       name of a group -> (members, number of collectives that the rank issued in it)
    first_event  number of the oldest event that the witness still has; the first event that was recorded has number 1
    last_ns      time of the last event, in ns of the clock that all ranks share
    done         whether the rank finished all its work
    problems     a line for each part of the witness that could not be read
    """

    rank: int
    host: str = ""
    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    labels: array[int] = field(default_factory=lambda: array("q"))
    seqs: array[int] = field(default_factory=lambda: array("q"))
    steps: array[int] = field(default_factory=lambda: array("q"))
    groups: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    first_event: int = 0
    last_ns: int = 0
    done: bool = False
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.starts)

    def spans(self) -> Iterator[Span]:
        return map(Span, self.starts, self.ends, self.labels, self.seqs, self.steps)

    def open(self, start_ns: int, label: int, seq: int = 0, step: int = -1) -> int:
        """Begin a time span, and return its index for :meth:`close`. The arguments are the fields of `Span`."""
        self.starts.append(start_ns)
        self.ends.append(OPEN)
        self.labels.append(label)
        self.seqs.append(seq)
        self.steps.append(step)
        return len(self.starts) - 1

    def close(self, place: int | None, end_ns: int) -> None:
        if place is not None:
            self.ends[place] = end_ns


class SharedClock:
    """Converts a rank's monotonic time to a clock that all ranks share: the wall clock.

    The offset between the two clocks is the same for all ranks of a host, so their times stay comparable.
    """

    def __init__(self) -> None:
        self._offsets: dict[str, int] = {}

    def offset_ns(self, witness: Witness) -> int:
        return self._offsets.setdefault(
            witness.writer.boot_id or witness.writer.hostname, witness.writer.wall_offset_ns
        )


def read_lane(witness: Witness, labels: Labels, clock: SharedClock) -> Lane:
    """Return the time spans of one witness.

    labels: the texts of the time spans of all ranks; those of this witness are added
    clock: converts the times; pass the same clock for all ranks
    """
    lane = Lane(witness.rank, witness.writer.hostname, first_event=witness.first_event, problems=witness.problems)
    lane.groups = {group.name: (group.members, group.issued) for group in witness.groups}
    shift_ns = clock.offset_ns(witness)
    name_call = _call_names(witness, labels)
    phase = step = None
    calls: dict[tuple[int, int], list[int]] = {}  # (group, seq) -> indices of the spans that end with this collective
    locks: dict[int, int] = {}
    held: dict[int, int] = {}
    builds: dict[int, int] = {}
    for event in witness.events():
        t_ns = event.t_ns + shift_ns
        lane.last_ns = t_ns
        match event.kind:
            case Kind.ENTER | Kind.ISSUE | Kind.WAIT:
                label = name_call("async" if event.kind == Kind.ISSUE else "call", event)
                calls.setdefault((event.group, event.seq), []).append(lane.open(t_ns, label, event.seq, event.step))
            case Kind.LEAVE:
                for place in calls.pop((event.group, event.seq), ()):
                    lane.close(place, t_ns)
            case Kind.STEP:
                lane.close(step, t_ns)
                step = lane.open(
                    t_ns, labels.number(Label("step", f"step {event.step}", note=f"{event.aux} live")), 0, event.step
                )
            case Kind.PHASE:
                lane.close(phase, t_ns)
                phase = lane.open(t_ns, labels.number(Label("phase", witness.text(event.phase))), 0, event.step)
            case Kind.LOCK_WAIT:
                holder = f"held by pid {event.aux}" if event.aux > 0 else ""
                label = labels.number(Label("lock", witness.text(event.sig), note=holder))
                locks[event.sig] = lane.open(t_ns, label, 0, event.step)
            case Kind.LOCK_HELD:
                lane.close(locks.pop(event.sig, None), t_ns)
                held[event.sig] = lane.open(t_ns, labels.number(Label("held", witness.text(event.sig))), 0, event.step)
            case Kind.LOCK_FREED:  # this also ends a wait that the rank abandoned
                lane.close(locks.pop(event.sig, None), t_ns)
                lane.close(held.pop(event.sig, None), t_ns)
            case Kind.BUILD_BEGIN:
                builds[event.sig] = lane.open(
                    t_ns, labels.number(Label("build", witness.text(event.sig))), 0, event.step
                )
            case Kind.BUILD_END:
                lane.close(builds.pop(event.sig, None), t_ns)
            case Kind.DONE:
                lane.close(step, t_ns)
                lane.close(phase, t_ns)
                step = phase = None
                lane.done = True
            case Kind.FAILED:
                lane.open(t_ns, labels.number(Label("failed", "failed", note=witness.text(event.sig))), 0, event.step)
    return lane


def _call_names(witness: Witness, labels: Labels) -> Callable[[str, Event], int]:
    """Return a function that adds the text of a collective to ``labels``, and returns the number of the text.

    The returned function gets the kind of the time span ("call" or "async") and the event of the collective.
    """
    numbers: dict[tuple[str, int, int, tuple[int, ...]], int] = {}

    def name(kind: str, event: Event) -> int:
        sizes = witness.sizes(event.vector, event.num_sizes)
        key = kind, event.sig, event.site, sizes
        number = numbers.get(key)
        if number is None:
            group, op, layer, dtype, reduce_op = witness.signature(event.sig)
            note = " ".join(part for part in (dtype, reduce_op, name_sizes(sizes)) if part)
            label = Label(kind, op, group, layer, note, short_site(witness.text(event.site)))
            number = numbers[key] = labels.number(label)
        return number

    return name


def name_sizes(sizes: tuple[int, ...]) -> str:
    """Format the sizes of a collective. If they are too many for a line, give only their number, range and sum."""
    if not sizes:
        return ""
    if len(sizes) <= _MOST_SIZES:
        return f"[{', '.join(map(str, sizes))}]"
    return f"[{len(sizes)} sizes {min(sizes)}..{max(sizes)}, sum {sum(sizes)}]"
