"""Find out what each rank does, from the last events of the rank's witness and from the facts about its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from repro.trace.knowledge import COLLECTIVES, Knows
from repro.trace.witness.file import Witness
from repro.trace.witness.format import Event, Identity, Kind
from repro.verdict.result import DAMAGED, UNFINISHED, Position

_LOCAL = frozenset(map(int, (Kind.LOCK_HELD, Kind.LOCK_FREED, Kind.BUILD_BEGIN, Kind.BUILD_END)))

GroupKey = tuple[str, tuple[int, ...]]  # name and members: two groups may have the same name


@dataclass(slots=True)
class RankState:
    """The position of one rank, and what the wait-for graph needs to know about this rank.

    group        the group of the collective in which the rank is blocked; None if it is blocked in none
    lock         the lock for which the rank waits; "" if it waits for none
    lock_holder  pid of the process that held this lock, as the rank recorded it; -1 if not known
    holds        the locks that the rank holds
    issued       group -> sequence number of the last collective that the rank issued in this group
    left         group -> sequence number of the last collective that the rank completed in this group
    host         a name for the rank's host and pid namespace: in this namespace, ``pid`` means only this rank
    seen         whether the witness is complete, and shows which collectives the rank issued and completed
    compares     whether ``seen`` is true, and the witness also shows the arguments of the collectives
    is_gone      whether the rank's process has ended
    beat         what the rank did at its last heartbeat, a sign of life that a rank records while it builds kernels;
                 "" if ``position`` says the same
    beat_s       age of this heartbeat in seconds; None if it is older than the present state of the rank
    """

    position: Position
    group: GroupKey | None = None
    lock: str = ""
    lock_holder: int = -1
    holds: set[str] = field(default_factory=set)
    issued: dict[GroupKey, int] = field(default_factory=dict)
    left: dict[GroupKey, int] = field(default_factory=dict)
    host: str = ""
    pid: int = 0
    witness: Witness | None = None
    seen: bool = False
    compares: bool = False
    is_gone: bool = False
    beat: str = ""
    beat_s: float | None = None
    _pending: set[tuple[GroupKey, int]] | None = None  # collectives whose wait has not ended; filled on first use

    def line(self, n: int) -> str:
        """Return the place of event ``n`` in the witness, as text: "rank003.wit:38912 event 118"."""
        return self.witness.line(n) if self.witness is not None and n else ""

    @property
    def rank(self) -> int:
        return self.position.rank

    def knows(self, key: GroupKey) -> bool:
        """Whether the witness shows how many collectives of a group the rank has issued."""
        return self.seen and self.witness is not None and (key in self.issued or self.witness.has_free_slots)

    def gave_up(self, key: GroupKey, seq: int) -> bool:
        """Whether the rank began to wait for a collective, did not complete it, and went on.

        This happens if the program catches an exception. If the rank issued the collective asynchronously and has never
        waited for it, return False.
        """
        if self.left.get(key, 0) >= seq or not self.seen or self.witness is None or self.state in ("dead", "failed"):
            return False
        if self.state != "done" and (self.group, self.position.seq) == (key, seq):
            return False  # the rank still waits for this collective
        if self._pending is None:
            kinds = self.witness.last_kinds()
            self._pending = {at for at, kind in kinds.items() if kind in (Kind.ENTER, Kind.WAIT)}
        return (key, seq) in self._pending

    @property
    def unable(self) -> bool:
        """Whether the rank cannot finish a collective that it entered.

        This is so if the rank failed, or if its process has ended or is suspended (SIGSTOP or a debugger).
        """
        if self.state == "done":
            return self.is_gone
        return self.state in ("dead", "failed") or (self.state == "running" and self.group is not None)

    @property
    def end_state(self) -> str:
        """Return the state of this rank as the wait-for graph uses it to explain why others wait for the rank.

        If the witness does not show all collectives of the rank, the state is "hidden", because the rank can be further
        than its witness shows. But the states "dead", "failed" and "missing" are returned even then.
        """
        return self.state if self.seen or self.state in ("dead", "failed", "missing") else "hidden"

    @property
    def state(self) -> str:
        return self.position.state


def locate(rank: int, witness: Witness | None, now_ns: int, alive: bool | None, excuse: str) -> RankState:
    """Find out what one rank does at the moment ``now_ns``, in ns on the clock of the rank's host.

    witness  None if the rank has no usable witness
    alive    whether the rank's process exists; None if this was not observed
    excuse   why the rank's process cannot make progress, from ``Facts.excused``; "" if it can
    """
    if witness is None:
        return RankState(Position(rank, "dead" if alive is False else "missing"))
    rank_state = _read(rank, witness, now_ns)
    rank_state.is_gone = alive is False
    position = rank_state.position
    if alive is False and position.state not in ("done", "failed"):
        rank_state.position = _with_state(position, "dead")
    elif excuse and position.state not in ("done", "failed"):
        rank_state.position = _with_state(position, "running", excuse)
    return rank_state


def _with_state(position: Position, state: str, detail: str = "") -> Position:
    return replace(position, state=state, detail=detail or position.detail)


def _read(rank: int, witness: Witness, now_ns: int) -> RankState:
    keys = {index: (group.name, group.members) for index, group in enumerate(witness.groups)}
    held, builds = _local_work(witness)
    last = witness.last
    blocked = _blocked_in(witness)
    groups = list(enumerate(witness.groups)) if Knows.ORDER in witness.knows and not witness.damaged else []
    rank_state = RankState(
        Position(rank, "starting"),
        holds=held,
        issued={keys[i]: group.issued for i, group in groups},
        left={keys[i]: group.left for i, group in groups},
        host=_host_of(witness.writer),
        pid=witness.writer.pid,
        witness=witness,
        seen=witness.complete and COLLECTIVES in witness.knows,
        compares=witness.complete and COLLECTIVES | Knows.ARGUMENTS in witness.knows,
    )
    if last is None:
        if not witness.complete:
            rank_state.position = Position(rank, "hidden", detail=DAMAGED if witness.damaged else "")
        return rank_state
    state, detail, layer, group_name, op, seq, site = "running", "", "", "", "", 0, ""
    sizes: tuple[int, ...] = ()
    since_ns = last.t_ns
    if blocked is not None and blocked.kind == Kind.LOCK_WAIT:
        state, detail = "locked", witness.text(blocked.sig)
        rank_state.lock, rank_state.lock_holder = detail, blocked.aux
        since_ns = _waits_since(witness)
    elif blocked is not None:
        state = "blocked"
        call = _issue_of(witness, blocked)
        signature = witness.signature(blocked.sig)
        layer, op, seq, group_name = signature.layer, signature.op, blocked.seq, signature.group
        sizes, site = witness.sizes(call.vector, call.num_sizes), witness.text(call.site)
        since_ns = blocked.t_ns
        key = keys.get(blocked.group)
        if key is not None and rank in key[1]:
            rank_state.group = key
        else:  # the witness does not show the members of the group
            state = "hidden"
    elif builds:
        state, detail = "building", next(reversed(builds))
        since_ns = builds[detail]
    elif held:
        detail = "holds lock " + ", ".join(sorted(held))
    if witness.heartbeat_ns > since_ns:
        rank_state.beat = witness.heartbeat if witness.heartbeat != detail else ""
        rank_state.beat_s = max(0, now_ns - witness.heartbeat_ns) / 1e9
    if last.kind == Kind.DONE:
        state = "done"
    elif last.kind == Kind.FAILED:
        state, detail = "failed", witness.text(last.sig)
    elif not witness.complete:
        state, detail = "hidden", DAMAGED if witness.damaged else detail
    elif COLLECTIVES not in witness.knows:
        state, detail = "hidden", UNFINISHED
    rank_state.position = Position(
        rank, state, witness.text(last.phase), last.step, layer, group_name, seq, op, sizes,
        max(0, now_ns - since_ns) / 1e9, detail, site, witness.line(last.n),
    )  # fmt: skip
    return rank_state


def _host_of(writer: Identity) -> str:
    """Return a name for the system in which a pid is unique: the host, and the pid namespace within it.

    Containers on one host have the same boot id, but one pid can be a different process in each container.
    """
    return f"{writer.boot_id}/{writer.hostname}/{writer.pid_namespace}"


def _local_work(witness: Witness) -> tuple[set[str], dict[str, int]]:
    """Return the locks that the rank holds; and a dict from each build that has not ended to its begin, in ns."""
    held: set[str] = set()
    builds: dict[str, int] = {}
    for index, kind in enumerate(witness.column("kind")):
        if kind not in _LOCAL:
            continue
        event = witness.event(index)
        name = witness.text(event.sig)
        match kind:
            case Kind.LOCK_HELD:
                held.add(name)
            case Kind.LOCK_FREED:
                held.discard(name)
            case Kind.BUILD_BEGIN:
                builds[name] = event.t_ns
            case Kind.BUILD_END:
                builds.pop(name, None)
    return held, builds


def _blocked_in(witness: Witness) -> Event | None:
    """Return the event with which the rank began to wait for a collective or a lock; None if the rank does not wait.

    The events DONE and FAILED at the end are ignored. So if a rank failed while it waited, this wait is returned.
    """
    kinds = witness.column("kind")
    index = len(kinds) - 1
    while index >= 0 and kinds[index] in (Kind.DONE, Kind.FAILED):
        index -= 1
    return witness.event(index) if index >= 0 and kinds[index] in (Kind.ENTER, Kind.WAIT, Kind.LOCK_WAIT) else None


def _waits_since(witness: Witness) -> int:
    """Return when the rank began to wait for the lock for which it waits now, in ns.

    This can be earlier than its last event: the rank records the wait again whenever the lock's holder changes.
    """
    since_ns, last = witness.last_event_ns(), witness.last
    for index in range(len(witness.column("kind")) - 1, -1, -1):
        event = witness.event(index)
        if last is None or (event.kind, event.sig) != (Kind.LOCK_WAIT, last.sig):
            break
        since_ns = event.t_ns
    return since_ns


def _issue_of(witness: Witness, event: Event) -> Event:
    """Return the event that issued the collective for which a rank waits. If it is overwritten, return ``event``.

    event   the event with which the rank began to wait for the collective
    """
    if event.kind == Kind.ENTER:
        return event
    issue = (Kind.ISSUE, event.group, event.seq)
    rows = zip(witness.column("kind"), witness.column("group"), witness.column("seq"), strict=True)
    return next((witness.event(index) for index, row in enumerate(rows) if row == issue), event)


def clocks(
    witnesses: Mapping[int, Witness], now_ns: int | Mapping[int, int], home: Identity | None = None
) -> tuple[dict[int, int], list[str]]:
    """Return the judged moment as a dict from rank to ns on the monotonic clock of its host; and lines of evidence.

    now_ns   the judged moment: one time on the clock of one host, or rank -> the time on the clock of the rank's host
    home     if ``now_ns`` is one time: a process on the host that measured it; default: the process of the lowest rank

    If ``now_ns`` is one time, it is converted to the monotonic clocks of the other hosts by means of the hosts' wall
    clocks. The result is wrong by as much as the wall clocks differ. A line of evidence says so.
    """
    if isinstance(now_ns, Mapping):
        return {rank: now_ns[rank] for rank in witnesses}, []
    if not witnesses:
        return {}, []
    home = home or witnesses[min(witnesses)].writer
    nows = {rank: now_ns + witness.writer.clock_ahead_ns(home) for rank, witness in witnesses.items()}
    num_remote = sum(witness.writer.boot_id not in ("", home.boot_id) for witness in witnesses.values())
    return nows, [
        f"times of {num_remote} ranks on other hosts are converted through wall clocks, and are only as exact as these"
    ] if num_remote else []
