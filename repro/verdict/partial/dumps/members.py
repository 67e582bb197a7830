"""Join the process groups of all dumps: which ranks are members of a group, and what each member recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from repro.trace.foreign.records import Group, GroupRecord, RecorderDump


def with_members(recorders: Mapping[int, RecorderDump]) -> dict[int, RecorderDump]:
    """Complete the groups in each dump: add the members and names that only the dumps of other ranks show.

    If a dump does not list the members of a group, as on gloo, all ranks whose dumps have entries of this group count
    as members. If a dump has only the counters of a group (numbers of the last queued and of the last completed
    operation), it has the id of the group, but no name. Then the name comes from the dump of another rank that has a
    name for this id.
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
    """Return, for each group with several members, a dict from rank to what the rank recorded in the group."""
    result: dict[Group, dict[int, GroupRecord]] = {}
    for rank, dump in recorders.items():
        for record in dump.groups:
            if record.group.name and len(record.group.members) > 1:
                key = Group(record.group.name, "", record.group.members)
                result.setdefault(key, {})[rank] = record
    return result


def lists_members(recorders: Mapping[int, RecorderDump], group: Group) -> bool:
    """Whether at least one dump lists the members of a group.

    If none does, as on gloo, the group can have members of which no dump has an entry.
    """
    return any(known.name == group.name and known.members for dump in recorders.values() for known in dump.configured)
