"""Find the process group of a collective, and the peer of a send or receive, from the local variables in a stack.

`py-spy --locals` prints a process group as its address, which differs between processes. But the program has the group
in a variable, and the variable's name is the same on all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_VARIABLES = 400
_GROUP = re.compile(r"<(?:[\w.]+\.)?ProcessGroup\w* at (0x[0-9a-fA-F]+)>")
_TORCH = re.compile(r"(?:^|/)torch/distributed/")
_PEERS = {"send": "dst", "isend": "dst", "recv": "src", "irecv": "src"}


def group_of(frames: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[str, ...]]:
    """Return two values: the variable that holds the collective's group, and the variables that hold other groups.

    A variable has the form "variable in function". The first value is "default" if the program passed no group to the
    collective, and "" if the variables do not show the group.

    frames: the frames of the stack, innermost first, as py-spy prints them in JSON
    """
    inner = [frame for frame in frames if _is_torch(frame)]
    program = [frame for frame in frames if not _is_torch(frame)]
    names: dict[str, str] = {}  # address of a group -> "variable in function"
    for frame in program:
        for name, text in variables_of(frame):
            if match := _GROUP.fullmatch(text):
                names.setdefault(match[1], f"{name} in {frame.get('name', '?')}")
    address = _address(inner)
    if address is None:
        return "", ()
    name = "default" if address == "" else names.get(address, "")
    return name, tuple(sorted(other for at, other in names.items() if at != address))


def _address(frames: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the address of the group that the program passed to the collective.

    Return "" if the program passed no group, and None if the variables do not show the group.
    """
    for frame in reversed(frames):
        variables = dict(variables_of(frame))
        if str(frame.get("name", "")).endswith("wrapper") and {"args", "kwargs"} <= variables.keys():
            match = _GROUP.search(variables["args"]) or _GROUP.search(variables["kwargs"])
            return match[1] if match else "" if not re.search(r"\bgroup\b|\bpg\b", variables["kwargs"]) else None
        if "group" in variables:
            match = _GROUP.search(variables["group"])
            return match[1] if match else "" if variables["group"] == "None" else None
    return None


def peer_of(frames: Sequence[Mapping[str, Any]], group: str) -> int | None:
    """Return the global rank of the peer of a send or receive; None if the variables do not show it.

    torch's ``group_dst`` and ``group_src`` count ranks within the group, so they show the peer only in the default
    group.

    frames: the frames of the stack, as py-spy prints them in JSON
    group: the first value that `group_of` returns
    """
    calls = [
        (_PEERS[str(frame.get("name"))], dict(variables_of(frame)))
        for frame in frames
        if _is_torch(frame) and str(frame.get("name")) in _PEERS
    ]
    for prefix in ("", "group_") if group == "default" else ("",):
        for name, variables in calls:
            if (text := variables.get(prefix + name, "")).isdigit():
                return int(text)
    return None


def variables_of(frame: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return (name, value as py-spy prints it) of each argument and local variable of a frame."""
    rows = frame.get("locals")
    for row in rows[:MAX_VARIABLES] if isinstance(rows, list) else ():
        if isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("repr"), str):
            yield row["name"], row["repr"]


def _is_torch(frame: Mapping[str, Any]) -> bool:
    return bool(_TORCH.search(str(frame.get("short_filename") or frame.get("filename") or "")))
