"""Build the wait-for graph: which ranks wait in which collective or lock, and for which other ranks.

A node is a collective or a lock, with the ranks that wait in it. The edges of a node lead to the ranks for which these
ranks wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from repro.verdict.cycle import find_cycle
from repro.verdict.evidence.ledger import Ledger, worst_difference
from repro.verdict.evidence.position import GroupKey, RankState
from repro.verdict.result import list_ranks

AMBIGUOUS = -1
NodeKey = tuple[str, GroupKey | tuple[str, str], int]


SENT_BY_ONE = ("broadcast", "scatter")
"""Operations in which a member waits only for the root, not for the other members."""


@dataclass(slots=True)
class Node:
    """A node of the wait-for graph: one collective or lock, the ranks that wait in it, and what the other ranks did.

    key            ("collective", group, sequence number) or ("lock", (host, name of the lock), 0)
    name           the node as text: "dp all_reduce #41", "lock experts"
    ranks          the ranks that wait in the collective or lock
    waits_for      the ranks that must act before those in ``ranks`` can continue
    returned       members that have completed this collective or a later one
    cannot_return  ranks that entered the collective or got the lock, and that are dead, failed or suspended
    unknown        members whose witness does not show whether they have issued the collective
    differs        "mismatch" or "sizes" if members issued this collective, or an earlier one of the group, with
                   different arguments
    differs_at     the sequence number of the collective with different arguments
    outside        if no rank holds the lock: pid of its holder, -1 if unknown, 0 if no process; otherwise None
    named          pid of the lock's holder as the waiting ranks recorded it; -1 if they did not record the same pid
    """

    key: NodeKey
    name: str
    ranks: list[int] = field(default_factory=list)
    waits_for: set[int] = field(default_factory=set)
    returned: set[int] = field(default_factory=set)
    cannot_return: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    differs: str = ""
    differs_at: int = 0
    outside: int | None = None
    named: int = -1

    def __str__(self) -> str:
        return f"{self.name} ({list_ranks(self.ranks)})"

    @property
    def collective(self) -> tuple[GroupKey, int]:
        """Return (group, sequence number). This is only for a node that is a collective, not a lock."""
        kind, (name, members), seq = self.key
        assert kind == "collective" and isinstance(members, tuple)
        return (name, members), seq

    @property
    def is_complete(self) -> bool:
        """Whether this is a collective that can end.

        It can end if every member has issued it with the same arguments, and no member has ended or is suspended in it.
        But a broadcast or scatter that some member has completed can end even if other members have not issued it,
        because the root has already sent its data.
        """
        return self.key[0] == "collective" and not self.waits_for | self.cannot_return | self.unknown


@dataclass(slots=True)
class Waits:
    """The wait-for graph, and where the chains of waits, from rank to rank, end.

    A node of the graph is a collective or a lock, with the ranks that wait in it.

    nodes          all nodes by key
    at             rank -> the node in which the rank waits
    cycle          the nodes of one cycle of waits; [] if there is none
    ends           state -> the ranks in this state for which other ranks wait, but which do not wait themselves
    outsiders      the nodes of locks that no rank holds: another process, an unknown process or no process holds them
    attended       the nodes of collectives that can end (`Node.is_complete`), and that no member has completed
    left_by_some   the nodes of collectives that can end, and that some members have completed
    """

    nodes: dict[NodeKey, Node]
    at: dict[int, Node]
    cycle: list[Node]
    ends: dict[str, set[int]]
    outsiders: list[Node]
    attended: list[Node]
    left_by_some: list[Node]


def wait_graph(
    rank_states: Mapping[int, RankState], ledger: Ledger, lock_holders: Mapping[int, tuple[str, int]]
) -> Waits:
    """Build the wait-for graph. A rank that died or failed inside a collective is among the ranks that wait in it.

    rank_states    rank -> what the rank does, which collectives it issued, and which locks it holds
    ledger         the collectives of all ranks; it shows which ones were issued with different arguments
    lock_holders   as `Facts.lock_holders`: rank -> (the lock for which the rank waits, pid of the lock's holder)
    """
    nodes: dict[NodeKey, Node] = {}
    at: dict[int, Node] = {}
    for rank, rank_state in rank_states.items():
        node = _node_of(rank_state, nodes)
        if node is not None:
            node.ranks.append(rank)
            at[rank] = node
    pids = _pids(rank_states)
    for node in nodes.values():
        if node.key[0] == "lock":
            _lock_edges(node, rank_states, pids, lock_holders)
        else:
            _collective_edges(node, rank_states, ledger)
    ends: dict[str, set[int]] = {}
    for node in nodes.values():
        for rank in node.waits_for | node.cannot_return | node.unknown:
            state = rank_states[rank].end_state if rank in rank_states else "missing"
            if rank in node.unknown and state not in ("dead", "failed", "missing"):
                state = "hidden"
            if state not in ("blocked", "locked"):
                ends.setdefault(state, set()).add(rank)
    complete = [node for node in nodes.values() if node.is_complete]
    return Waits(
        nodes, at, _cycle_of(list(nodes.values()), at), ends,
        [node for node in nodes.values() if node.outside is not None],
        [node for node in complete if not node.returned],
        [node for node in complete if node.returned],
    )  # fmt: skip


def _pids(rank_states: Mapping[int, RankState]) -> dict[tuple[str, int], int]:
    """Return a dict from (host, pid) to the rank of this process; AMBIGUOUS if two ranks have the same host and pid.

    Two ranks have the same host and pid if two hosts have the same identity, for example copies of one virtual machine.
    """
    ranks: dict[tuple[str, int], list[int]] = {}
    for rank, rank_state in rank_states.items():
        if rank_state.pid:
            ranks.setdefault((rank_state.host, rank_state.pid), []).append(rank)
    return {process: owners[0] if len(owners) == 1 else AMBIGUOUS for process, owners in ranks.items()}


def _node_of(rank_state: RankState, nodes: dict[NodeKey, Node]) -> Node | None:
    position = rank_state.position
    if rank_state.state in ("running", "hidden", "missing", "done"):
        return None
    key: NodeKey
    if rank_state.lock:
        key, name = ("lock", (rank_state.host, rank_state.lock), 0), f"lock {rank_state.lock}"
    elif rank_state.group is not None:
        key, name = ("collective", rank_state.group, position.seq), f"{position.group} {position.op} #{position.seq}"
    else:
        return None
    node = nodes.setdefault(key, Node(key, name))
    if node.name != name:  # the ranks issued different operations
        node.name = f"{position.group} #{position.seq}"
    return node


def _collective_edges(node: Node, rank_states: Mapping[int, RankState], ledger: Ledger) -> None:
    key, seq = node.collective
    for member in key[1]:
        rank_state = rank_states.get(member)
        if rank_state is not None and rank_state.left.get(key, 0) >= seq:
            node.returned.add(member)
        elif rank_state is None or (rank_state.issued.get(key, 0) < seq and not rank_state.knows(key)):
            node.unknown.add(member)
        elif rank_state.issued.get(key, 0) < seq or rank_state.gave_up(key, seq):
            node.waits_for.add(member)
        elif rank_state.unable:
            node.cannot_return.add(member)
    if node.returned and rank_states[node.ranks[0]].position.op in SENT_BY_ONE:
        node.waits_for.clear()  # the root has sent its data
    # If a collective of a group cannot complete, no later one of the group completes. So search for one with different
    # arguments, from the first that a rank of this node has not completed.
    here = min((rank_states[member].issued.get(key, 0) for member in key[1] if member in rank_states), default=0)
    low = min(rank_states[rank].left.get(key, 0) for rank in node.ranks)
    seq, sides = ledger.refused(key, low, min(seq, here))
    if sides:
        node.differs, node.differs_at = worst_difference(sides), seq
        node.waits_for |= {rank for side in sides for rank in side.ranks if rank_states[rank].left.get(key, 0) < seq}


def _lock_edges(
    node: Node,
    rank_states: Mapping[int, RankState],
    pids: Mapping[tuple[str, int], int],
    lock_holders: Mapping[int, tuple[str, int]],
) -> None:
    host, lock = node.key[1]
    assert isinstance(lock, str)
    named = {rank_states[rank].lock_holder for rank in node.ranks}
    node.named = named.pop() if len(named) == 1 else -1
    seen = {holder for rank in node.ranks for name, holder in (lock_holders.get(rank, ("", 0)),) if name == lock}
    holders = {rank for rank, s in rank_states.items() if lock in s.holds and s.host == host}
    others = {pid for pid in seen if pid > 0} - {rank_states[rank].pid for rank in holders}
    if len(seen) > 1 or (holders and others):  # these observations are of different moments and contradict each other
        node.outside = -1
        return
    if holders:
        node.waits_for |= holders
        return
    pid = next(iter(seen), node.named)
    rank = pids.get((str(host), pid))
    if rank is None or rank == AMBIGUOUS:
        node.outside = pid if rank is None else -1
    elif rank in node.ranks:
        node.cannot_return.add(rank)  # the rank got the lock, and stopped before it recorded this
    elif seen or not rank_states[rank].seen:
        node.waits_for.add(rank)
    else:
        node.outside = -1  # the rank held the lock when the others began to wait, and has released it since


def _cycle_of(nodes: Sequence[Node], at: Mapping[int, Node]) -> list[Node]:
    # id() stands for a node, because to hash the node's key takes long for a large group
    places = {id(node): place for place, node in enumerate(nodes)}
    waits_for = {
        place: dict.fromkeys(places[id(at[rank])] for rank in sorted(node.waits_for) if rank in at)
        for place, node in enumerate(nodes)
    }
    return [nodes[place] for place in find_cycle(waits_for)]
