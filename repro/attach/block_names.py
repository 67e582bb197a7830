"""Names of blocks that differ by rank, such as ``f"expert {rank}"``: they cannot be compared between ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from repro.trace.format import SEPARATOR
from repro.trace.witness import Witness

OWN_NAME = "a name of its own"
_FIELDS = 5  # group, op, layer, dtype, reduce_op
_LAYER = 2


def blocks_compared(witnesses: dict[int, Witness]) -> dict[int, Witness]:
    """The witnesses with one name in place of all block names that a single rank uses.

    A collective in such a block is still compared with its peers in everything else, and with a block of a name that
    several ranks use in its name as well.
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
    # The rolling hashes cover the names, and no longer say which ranks differ.
    groups = tuple(replace(group, last=group.last and group.last._replace(hash=0)) for group in witness.groups)
    return replace(witness, strings=strings, groups=groups, _signatures={})
