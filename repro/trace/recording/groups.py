"""The groups of a rank: their members, their counters, and their slots in the witness file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from repro.trace.recording.calls import Group
from repro.trace.recording.string_areas import Buffer, live_words
from repro.trace.witness.format import (
    GROUP_BYTES,
    GROUP_NAME,
    GROUPS_AT,
    GUARD,
    NO_GROUP,
    Geometry,
    pack_group_name,
)


class Groups:
    """Gives each group of the rank a slot (128 bytes for its progress) in the witness file.

    A group gets its slot as soon as it is declared or used.

    intern  stores a text in the witness and returns the text's number
    make    creates the `Group` object, which counts the collectives of one group. Its argument is the index of the
            group's slot, or NO_GROUP if the file has no slot left
    """

    def __init__(
        self,
        buffer: Buffer,
        shape: Geometry,
        intern: Callable[[str], int],
        num_ranks: int,
        make: Callable[[int], Group],
    ) -> None:
        self._buffer = buffer
        self._live = live_words(buffer)
        self._num_slots = shape.group_slots
        self._intern = intern
        self._all_ranks = range(num_ranks)
        self._make = make
        self._groups: dict[str, Group] = {}
        self._members: dict[str, tuple[int, ...]] = {}

    def declare(self, name: str, ranks: Sequence[int]) -> None:
        """Note the global ranks of a group, and give it a slot in the file. Call this before the group's first use."""
        self._members[name] = tuple(ranks)
        self.of(name)

    def members(self, name: str) -> Sequence[int]:
        """Return the ranks of a group; all ranks of the job if the members of the group were not declared."""
        return self._members.get(name, self._all_ranks)

    def of(self, name: str) -> Group:
        """Return the `Group` object (counters) of a group. The first call for a group also gives it a slot in the file.

        If no slot is left, the group is only counted.
        """
        group = self._groups.get(name)
        if group is None:
            index = len(self._groups)
            self._groups[name] = group = self._make(index if index < self._num_slots else NO_GROUP)
            if group.index != NO_GROUP:
                members = ",".join(map(str, self.members(name)))
                at = GROUPS_AT + group.index * GROUP_BYTES
                self._buffer[at : at + GROUP_NAME.size] = pack_group_name(self._intern(name), self._intern(members))
                self._live[3] = (group.index + 1) * GUARD
        return group
