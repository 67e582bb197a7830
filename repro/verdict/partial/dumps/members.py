"""Join the groups of all dumps: which ranks belong to a group, and what each of them recorded of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from repro.trace.foreign.records import Group, GroupRecord, RecorderDump


def with_members(recorders: Mapping[int, RecorderDump]) -> dict[int, RecorderDump]:
    """Complete each dump from the dumps of other members that name the same group id.

    gloo dumps do not list members, and a dump with a counter but no entries does not name the counter's group.
    """
    recorded: dict[str, set[int]] = {}
    names: dict[str, dict[str, set[int]]] = {}  # id -> name -> ranks that use this name
    for rank, dump in recorders.items():
        for record in dump.groups:
            if record.calls:
                recorded.setdefault(record.group.name, set()).add(rank)
            if record.number and record.group.name:
                names.setdefault(record.number, {}).setdefault(record.group.name, set()).add(rank)

    def complete(dump: RecorderDump, record: GroupRecord) -> GroupRecord:
        group = record.group
        if not group.name and record.number in names:
            mine = {it.name: it for it in dump.configured}
            fitting = [mine[name] for name in names[record.number] if name in mine and dump.rank in mine[name].members]
            if len(fitting) == 1:
                group = fitting[0]
        if group.name and not group.members:
            group = replace(group, members=tuple(sorted(recorded.get(group.name, ()))))
        return replace(record, group=group)

    return {
        rank: replace(dump, groups=tuple(complete(dump, record) for record in dump.groups))
        for rank, dump in recorders.items()
    }


def groups_of(recorders: Mapping[int, RecorderDump]) -> dict[Group, dict[int, GroupRecord]]:
    """Return group -> rank -> that rank's record of the group."""
    result: dict[Group, dict[int, GroupRecord]] = {}
    for rank, dump in recorders.items():
        for record in dump.groups:
            if record.group.name and len(record.group.members) > 1:
                key = Group(record.group.name, "", record.group.members)
                result.setdefault(key, {})[rank] = record
    return result


def lists_members(recorders: Mapping[int, RecorderDump], group: Group) -> bool:
    """Whether a dump lists the group's members. gloo dumps do not; there the ranks with entries count as members."""
    return any(known.name == group.name and known.members for dump in recorders.values() for known in dump.configured)
