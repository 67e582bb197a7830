"""The wait-for graph: ranks that stand at the same place are one node, its edges are the ranks they lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from repro.verdict.ledger import Ledger, widest
from repro.verdict.position import GroupKey, Standing
from repro.verdict.result import list_ranks

NodeKey = tuple[str, GroupKey | tuple[str, str], int]  # ("collective", group, seq) or ("lock", (host, name), 0)


@dataclass(slots=True)
class Node:
    """Ranks that wait in one collective or for one lock."""

    key: NodeKey
    name: str
    ranks: list[int] = field(default_factory=list)
    lacks: set[int] = field(default_factory=set)  # ranks that must act before these can go on
    lost: set[int] = field(default_factory=set)  # ranks that are here, or were, but whose process cannot go on
    differs: str = ""  # mismatch or sizes: they will not pair although all are there
    outside: int | None = None  # pid of a lock holder that is no rank; -1 unknown, 0 nobody
    named: int = -1  # pid that those who wait for a lock were told

    def __str__(self) -> str:
        return f"{self.name} ({list_ranks(self.ranks)})"


@dataclass(slots=True)
class Waits:
    """The graph with what follows from it."""

    nodes: dict[NodeKey, Node]
    at: dict[int, Node]  # rank -> the node it waits in
    cycle: list[Node]
    ends: dict[str, set[int]]  # state -> the ranks of that state that somebody waits for, at any remove
    outsiders: list[Node]
    attended: list[Node]  # collectives that lack nobody and are not over


def wait_graph(standings: Mapping[int, Standing], ledger: Ledger, lock_holders: Mapping[int, tuple[str, int]]) -> Waits:
    """Build the graph. A rank that died or gave up inside a collective still stands there."""
    nodes: dict[NodeKey, Node] = {}
    at: dict[int, Node] = {}
    for rank, standing in standings.items():
        node = _node_of(standing, nodes)
        if node is not None:
            node.ranks.append(rank)
            at[rank] = node
    pids = {(s.host, s.pid): rank for rank, s in standings.items() if s.pid}
    for node in nodes.values():
        if node.key[0] == "lock":
            _lock_edges(node, standings, pids, lock_holders)
        else:
            _collective_edges(node, standings, ledger)
    cycle = _find_cycle(nodes, at)
    ends: dict[str, set[int]] = {}
    for node in nodes.values():
        for rank in node.lacks | node.lost:
            if standings[rank].state not in ("blocked", "locked"):
                ends.setdefault(standings[rank].state, set()).add(rank)
    waiting = list(nodes.values())
    return Waits(
        nodes, at, cycle, ends,
        [node for node in waiting if node.outside is not None],
        [node for node in waiting if node.key[0] == "collective" and not node.lacks | node.lost],
    )  # fmt: skip


def _node_of(standing: Standing, nodes: dict[NodeKey, Node]) -> Node | None:
    position = standing.position
    if standing.state in ("running", "hidden", "missing", "done"):
        return None
    key: NodeKey
    if standing.lock:
        key, name = ("lock", (standing.host, standing.lock), 0), f"lock {standing.lock}"
    elif standing.group is not None:
        key, name = ("collective", standing.group, position.seq), f"{position.group} {position.op} #{position.seq}"
    else:
        return None
    return nodes.setdefault(key, Node(key, name))


def _collective_edges(node: Node, standings: Mapping[int, Standing], ledger: Ledger) -> None:
    _, group, seq = node.key
    assert isinstance(group[1], tuple)
    key = (group[0], group[1])
    for member in key[1]:
        standing = standings.get(member)
        if standing is None:
            continue
        if standing.issued.get(key, 0) < seq or standing.gave_up(key, seq):
            node.lacks.add(member)
        elif standing.left.get(key, 0) < seq and standing.unable:
            node.lost.add(member)
    over = max((standings[member].left.get(key, 0) for member in key[1] if member in standings), default=0)
    here = min((standings[member].issued.get(key, 0) for member in key[1] if member in standings), default=0)
    sides = ledger.refused(key, over, min(seq, here))  # in a group nothing later completes either
    if sides:
        node.differs = widest(sides)
        node.lacks |= {rank for side in sides for rank in side.ranks}


def _lock_edges(
    node: Node,
    standings: Mapping[int, Standing],
    pids: Mapping[tuple[str, int], int],
    lock_holders: Mapping[int, tuple[str, int]],
) -> None:
    host, lock = node.key[1]
    assert isinstance(lock, str)
    holders = {rank for rank, s in standings.items() if lock in s.holds and s.host == host}
    if holders:
        node.lacks |= holders
        return
    node.named = max({standings[rank].lock_holder for rank in node.ranks}, default=-1)
    seen = {holder for rank in node.ranks for name, holder in (lock_holders.get(rank, ("", 0)),) if name == lock}
    if len(seen) > 1:  # the looks at it fell before and after a change of holder
        node.outside = -1
        return
    pid = next(iter(seen), node.named)
    rank = pids.get((str(host), pid))
    if rank is None:
        node.outside = pid
    elif rank in node.ranks:
        node.lost.add(rank)  # it has the lock and stopped before it could say so
    elif seen or not standings[rank].seen:
        node.lacks.add(rank)
    else:
        node.outside = -1  # it held the lock when somebody began to wait, and has let go since


def _find_cycle(nodes: Mapping[NodeKey, Node], at: Mapping[int, Node]) -> list[Node]:
    """Some cycle of nodes, empty if there is none; iterative, since chains may be long."""
    done: set[NodeKey] = set()
    for root in nodes.values():
        if root.key in done:
            continue
        path: list[Node] = []
        on_path: dict[NodeKey, int] = {}
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                path.pop()
                del on_path[node.key]
                done.add(node.key)
                continue
            if node.key in done or node.key in on_path:
                continue
            on_path[node.key] = len(path)
            path.append(node)
            stack.append((node, True))
            for following in {at[rank].key: at[rank] for rank in sorted(node.lacks) if rank in at}.values():
                if following.key in on_path:
                    return path[on_path[following.key] :]
                if following.key not in done:
                    stack.append((following, False))
    return []
