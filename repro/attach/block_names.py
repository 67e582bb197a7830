"""Replace block names that only one rank uses, such as "expert 3", by one common name.

A block is the ``with assert_no_deadlock(name)`` of a test. If each rank gave its block another name, the judge would
say that the ranks differ, although only the names do. With the common name, the judge compares the other fields of the
collectives (group, operation, sizes, …).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from repro.trace.witness.file import Witness
from repro.trace.witness.format import SEPARATOR

OWN_NAME = "a name of its own"
_FIELDS = 5  # the fields of the key: group, op, layer, dtype, reduce_op
_LAYER = 2


def blocks_compared(witnesses: dict[int, Witness]) -> dict[int, Witness]:
    """Return the witnesses with one common name in place of each block name that only one rank uses.

    A block name is the name in ``with assert_no_deadlock(name)``; a witness has it as the layer of the collectives. A
    block name that several ranks use is kept, so the judge still compares it.

    witnesses: a dict from rank to the witness of this rank
    """
    layers = {rank: {parts[_LAYER] for parts in _signatures(witness)} for rank, witness in witnesses.items()}
    users = Counter(layer for names in layers.values() for layer in names)
    own = {layer for layer, num_users in users.items() if num_users == 1 and layer}
    if len(witnesses) < 2 or not own:
        return witnesses
    return {rank: _renamed(witness, own) for rank, witness in witnesses.items()}


def _signatures(witness: Witness) -> list[list[str]]:
    return [parts for text in witness.strings if len(parts := text.split(SEPARATOR)) == _FIELDS]


def _renamed(witness: Witness, own: set[str]) -> Witness:
    strings = []
    for text in witness.strings:
        parts = text.split(SEPARATOR)
        if len(parts) == _FIELDS and parts[_LAYER] in own:
            parts[_LAYER] = OWN_NAME
        strings.append(SEPARATOR.join(parts))
    # The rolling hashes cover the block names, so after the change they no longer show which ranks differ.
    groups = tuple(replace(group, last=group.last and group.last._replace(hash=0)) for group in witness.groups)
    return replace(witness, strings=strings, groups=groups, _signatures={})
