"""Match the collectives of all ranks by group and sequence number, and find those that differ between ranks.

This takes one pass over the events of all ranks, so time and memory grow linearly with the number of events.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from repro.trace.knowledge import Knows
from repro.trace.witness.file import Signature, Witness
from repro.trace.witness.format import Kind
from repro.verdict.evidence.position import GroupKey
from repro.verdict.result import list_ranks

_ENTER, _ISSUE = int(Kind.ENTER), int(Kind.ISSUE)
TRANSFERS = ("send", "recv")
UNKNOWN = "?"
"""Stands in a field of a `Call` that the witness does not record. It counts as equal to every other value."""
UNKNOWN_ROOT = -2
HASHED = Knows.ORDER | Knows.LAYERS | Knows.ARGUMENTS
"""The aspects that a rolling hash covers. Two hashes are compared only if both witnesses record the same aspects."""


class Call(NamedTuple):
    """One collective as one rank issued it. All fields must be equal on all members of the group.

    A send or receive is a call, too. Its sender and receiver need not have the same fields.

    signature   group, operation, layer, dtype and reduce operation
    root        group rank of the root; of a send or receive, group rank of the other end; -1 if there is none
    sizes       the sizes that must be equal on all members; () if there are none, or if they are not known
    """

    signature: Signature
    root: int
    sizes: tuple[int, ...]
    step: int


class CallVariant(NamedTuple):
    """One of the different calls that members of a group issued under one sequence number.

    ranks   the ranks that issued this call
    left    those of ``ranks`` that also completed the collective
    site    the call site on one of these ranks
    t_ns    when the first of ``ranks`` issued the call, in ns on the clock of its host
    """

    call: Call
    ranks: tuple[int, ...]
    left: tuple[int, ...]
    site: str
    t_ns: int


class Ledger:
    """The collectives of all ranks, matched by group and sequence number.

    diverged   group -> the sequence numbers under which its members issued different calls
    """

    def __init__(self, witnesses: Mapping[int, Witness]) -> None:
        self._witnesses = witnesses
        self._first: dict[GroupKey, dict[int, Call]] = {}
        self._differing: dict[GroupKey, dict[int, list[tuple[int, Row, Call]]]] = {}
        self.diverged: dict[GroupKey, set[int]] = {}
        for witness in witnesses.values():
            # id() stands for a group, because to hash its key takes long for a large group
            tables: dict[int, dict[int, Call]] = {}
            for key, seq, _, call in calls(witness):
                if not key[1]:
                    continue  # the members cannot be read
                table = tables.get(id(key))
                if table is None:
                    table = tables[id(key)] = self._first.setdefault(key, {})
                first = table.setdefault(seq, call)
                if first is not call and first != call and difference(first, call):
                    self.diverged.setdefault(key, set()).add(seq)

    def sides(self, key: GroupKey, seq: int) -> list[CallVariant]:
        """Return the different calls that members of the group ``key`` issued under the sequence number ``seq``.

        The call of the lowest rank comes first.
        """
        together: dict[Call, list[tuple[int, bool, str, int]]] = {}
        for rank, event, call in self._rows(key, seq):
            witness = self._witnesses[rank]
            left = any(g.left >= seq for g in witness.groups if (g.name, g.members) == key)
            together.setdefault(call, []).append((rank, left, witness.text(event.site), event.t_ns))
        _merge_unknown(together)
        merged: list[CallVariant] = []
        for call, rows in sorted(together.items(), key=lambda item: item[1][0][0]):
            side = CallVariant(
                call, tuple(r for r, *_ in rows), tuple(r for r, left, *_ in rows if left), rows[0][2],
                min(row[3] for row in rows),
            )  # fmt: skip
            merged.append(side)
        return merged

    def _rows(self, key: GroupKey, seq: int) -> list[tuple[int, Row, Call]]:
        """Return (rank, call site and time, call) for each member's first call under a sequence number.

        If the members' calls differ under this number, one pass over the events reads the calls of all such numbers of
        the group, and the ledger keeps these calls.
        """
        members = [rank for rank in key[1] if rank in self._witnesses]
        numbers = self.diverged.get(key, set())
        if seq not in numbers:
            first_calls = ((rank, next(calls(self._witnesses[rank], key, seq), None)) for rank in members)
            return [(rank, row[2], row[3]) for rank, row in first_calls if row is not None]
        if key not in self._differing:
            rows: dict[int, list[tuple[int, Row, Call]]] = {number: [] for number in numbers}
            for rank in members:
                seen: set[int] = set()
                for other, number, row, call in calls(self._witnesses[rank]):
                    if number in numbers and number not in seen and other == key:
                        seen.add(number)
                        rows[number].append((rank, row, call))
            self._differing[key] = rows
        return self._differing[key][seq]

    def refused(self, key: GroupKey, over: int, upto: int) -> tuple[int, list[CallVariant]]:
        """Find the first collective that members issued with different arguments, so that it possibly never completes.

        key          the group, as (name, members)
        over, upto   search the sequence numbers over + 1 to upto

        Return the sequence number and the different calls; (0, []) if there is no such collective.
        """
        for seq in sorted(number for number in self.diverged.get(key, ()) if over < number <= upto):
            sides = self.sides(key, seq)
            if worst_difference(sides) in ("mismatch", "sizes"):
                return seq, sides
        return 0, []

    def hidden_divergence(self, but: Collection[str] = ()) -> list[str]:
        """Find groups whose members issued different collectives in events that the witnesses no longer contain.

        A witness keeps a rolling hash of all collectives that the rank issued in a group. Return a sentence for each
        group whose members issued equally many collectives, but have different hashes. A group is left out if its
        name is in ``but``, or if the witnesses still contain different calls of its members.
        """
        hashes: dict[tuple[GroupKey, int, Knows], dict[int, list[int]]] = {}
        for rank, witness in self._witnesses.items():
            for group in witness.groups if witness.complete else ():
                if group.hash and group.name not in but and Knows.ORDER in witness.knows:
                    key = (group.name, group.members), group.issued, witness.knows & HASHED
                    hashes.setdefault(key, {}).setdefault(group.hash, []).append(rank)
        return [
            f"ranks of {key[0]} issued different collectives before #{issued}, as their rolling hashes differ: "
            + " | ".join(list_ranks(ranks) for ranks in sides.values())
            for (key, issued, _), sides in hashes.items()
            if len(sides) > 1 and key not in self.diverged
        ]

    def first_divergence(self) -> tuple[GroupKey, int, list[CallVariant]] | None:
        """Return the earliest collective that members issued differently; None if there is none.

        The result is (group, sequence number, the different calls). The earliest collective is the one of the lowest
        step; within a step, the one that was issued first.
        """
        divergences = []
        for key, seqs in self.diverged.items():
            sides = self.sides(key, min(seqs))
            step = min(side.call.step for side in sides)
            divergences.append(((step, min(side.t_ns for side in sides)), key, min(seqs), sides))
        if not divergences:
            return None
        _, key, seq, sides = min(divergences, key=lambda row: row[0])
        return key, seq, sides


def _merge_unknown(together: dict[Call, list[tuple[int, bool, str, int]]]) -> None:
    """Merge each call that is only partly known into the call that it matches. If it matches several calls, drop it.

    A field that is not known, such as sizes that were overwritten, matches every value.

    together   call -> (rank, whether the rank completed the call, call site, time in ns) for each rank that issued it
    """
    for call in [call for call in together if not call.sizes or call.step < 0 or UNKNOWN in call.signature]:
        alike = [other for other in together if other is not call and not difference(call, other)]
        if alike and call in together:
            rows = together.pop(call)
            if len(alike) == 1:
                together[call] = sorted(rows + together.pop(alike[0]))


class Row(NamedTuple):
    """The call site of a collective (as an index into the witness's strings), and the time when it was issued."""

    site: int
    t_ns: int


def calls(witness: Witness, only: GroupKey | None = None, number: int = 0) -> Iterator[tuple[GroupKey, int, Row, Call]]:
    """Yield (group, sequence number, call site and time, call) of each collective that a rank issued, oldest first.

    Exception: if the event of the last collective of a group is already overwritten, this collective is yielded before
    all others. It is read from the part of the witness that keeps the last collective of each group.

    only, number   if ``only`` is given: yield only the collectives of this group with this sequence number
    """
    keys = [(group.name, group.members) for group in witness.groups]
    for group, key in zip(witness.groups, keys, strict=True):
        last = group.last
        if last is None or witness.first_event <= last.n <= witness.num_events or last.sig >= len(witness.strings):
            continue
        if only is None or (only, number) == (key, last.seq):
            call = Call(witness.signature(last.sig), last.aux, witness.sizes(last.vector, last.num_sizes), last.step)
            yield key, last.seq, Row(last.site, last.t_ns), _shown(witness, call)
    num_strings = len(witness.strings)  # a collective whose name is not among the strings cannot be compared
    only_index = -1 if only is None or only not in keys else keys.index(only)
    sized = (-1, -1)
    sizes: tuple[int, ...] = ()  # kept from call to call, because successive calls usually have the same sizes
    names = ("kind", "seq", "vector", "step", "aux", "sig", "num_sizes", "group", "site", "t_ns")
    for kind, seq, vector, step, aux, sig, num_sizes, index, site, t_ns in zip(
        *map(witness.column, names), strict=True
    ):
        if (kind != _ENTER and kind != _ISSUE) or sig >= num_strings or index >= len(keys):
            continue  # a group without a slot in the file has unknown members, so its calls cannot be matched
        if only is not None and (seq != number or (only_index >= 0 and index != only_index)):
            continue
        signature = witness.signature(sig)
        key = keys[index]
        if only is None or key == only:
            if sized != (vector, num_sizes):
                sized, sizes = (vector, num_sizes), witness.sizes(vector, num_sizes)
            call = Call(signature, aux, sizes, step)
            yield key, seq, Row(site, t_ns), call if HASHED in witness.knows else _shown(witness, call)


def _shown(witness: Witness, call: Call) -> Call:
    """Return the call with UNKNOWN, UNKNOWN_ROOT or () in each field that the rank's witness does not record."""
    signature = call.signature
    if Knows.LAYERS not in witness.knows:
        signature = signature._replace(layer=UNKNOWN)
    if Knows.ARGUMENTS not in witness.knows:
        signature = signature._replace(dtype=UNKNOWN, reduce_op=UNKNOWN)
        call = call._replace(root=UNKNOWN_ROOT, sizes=())
    return call._replace(signature=signature)


def is_transfer(signature: Signature) -> bool:
    """Whether this is the signature of a send or a receive."""
    return signature.op in TRANSFERS


def difference(a: Call, b: Call) -> str:
    """Return the greatest difference between two calls under one sequence number of a group.

    "mismatch"   operation, dtype, reduce operation or root differ
    "sizes"      operation, dtype, reduce operation and root are equal, but sizes differ
    "place"      only layer or step differ
    ""           nothing differs

    A field that a witness does not record counts as equal. Of sends and receives, only dtype and sizes are compared.
    """
    if is_transfer(a.signature) and is_transfer(b.signature):
        if _differ(a.signature.dtype, b.signature.dtype):
            return "mismatch"
        return "sizes" if a.sizes and b.sizes and a.sizes != b.sizes else ""
    fields = ((a.signature.op, b.signature.op), (a.signature.dtype, b.signature.dtype),
              (a.signature.reduce_op, b.signature.reduce_op), (a.root, b.root))  # fmt: skip
    if any(map(_differ, *zip(*fields, strict=True))):
        return "mismatch"
    if a.sizes and b.sizes and a.sizes != b.sizes:
        return "sizes"
    if _differ(a.signature.layer, b.signature.layer) or (a.step != b.step and min(a.step, b.step) >= 0):
        return "place"
    return ""


def _differ(one: str | int, other: str | int) -> bool:
    return one != other and not {one, other} & {UNKNOWN, UNKNOWN_ROOT}


def worst_difference(sides: list[CallVariant]) -> str:
    """Return the greatest difference between the first call and one of the others; "" if nothing differs.

    The differences, from the greatest to the smallest, are "mismatch", "sizes" and "place" (see `difference`).

    sides   the different calls that members of a group issued under one sequence number
    """
    kinds = {difference(sides[0].call, side.call) for side in sides[1:]}
    return next((kind for kind in ("mismatch", "sizes", "place") if kind in kinds), "")
