"""Merge the stacks of all ranks into one tree, outermost frame first, as STAT does (Arnold et al., IPDPS 2007).

A branch with few ranks does not prove that these ranks are at fault: perhaps they are the only ones that work as
intended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from repro.trace.foreign.records import Stack
from repro.verdict.result import list_ranks

MAX_DEPTH = 120


@dataclass(slots=True)
class Node:
    """A frame of the tree into which the stacks of all processes are merged.

    names      the processes whose stacks have this frame, below the same outer frames
    ends       the processes among `names` whose innermost frame is this frame
    children   frame -> the node of this frame, for each frame that this frame calls
    """

    frame: str
    names: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    children: dict[str, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the tree of stacks: consecutive frames that all processes of `names` share, outermost frame first.

    depth   how many lines of outer frames are above these frames; 0 for the outermost line
    ends    the processes whose innermost frame is the last of these frames
    """

    depth: int
    frames: tuple[str, ...]
    names: tuple[str, ...]
    ends: tuple[str, ...]


def merge(stacks: Iterable[Stack]) -> Node:
    """Merge stacks into a tree. Line numbers are dropped, because they would split one function into many branches."""
    root = Node("")
    for stack in stacks:
        name = str(stack.process)
        node = root
        node.names.append(name)
        for frame in reversed(stack.frames[:MAX_DEPTH]):
            key = re.sub(r":\d+\)$", ")", frame)
            node = node.children.setdefault(key, Node(key))
            node.names.append(name)
        node.ends.append(name)
    return root


def lines(root: Node) -> list[Line]:
    """Return the tree as lines, from the outermost frame inwards.

    Consecutive frames without a branch share a line. At a branch, the subtree with the most processes comes first.
    """
    tree: list[Line] = []
    stack: list[tuple[Node, int]] = [(child, 0) for child in _ordered(root)]
    while stack:
        node, depth = stack.pop()
        frames = [node.frame]
        while len(node.children) == 1 and not node.ends:
            (node,) = node.children.values()
            frames.append(node.frame)
        tree.append(Line(depth, tuple(frames), tuple(node.names), tuple(node.ends)))
        stack += [(child, depth + 1) for child in _ordered(node)]
    return tree


def _ordered(node: Node) -> list[Node]:
    """Return the children, the child with the most processes last, because `lines` takes nodes from the end."""
    return sorted(node.children.values(), key=lambda child: (len(child.names), child.frame))


def text(root: Node, frames_a_line: int = 2) -> list[str]:
    """Return the tree as lines of text: "[ranks 0-2,4-7] acquire (filelock/_api.py)".

    frames_a_line   how many frames of a line to show, the innermost ones; the other frames are only counted
    """
    out = []
    for line in lines(root):
        shown = line.frames[-frames_a_line:]
        left_out = len(line.frames) - len(shown)
        dots = f"… {left_out} frames … > " if left_out else ""
        out.append(f"{'  ' * line.depth}[{name_all(line.names)}] {dots}{' > '.join(shown)}")
    return out


def name_all(names: Sequence[str]) -> str:
    """Return "ranks 0-2,4-7", followed by the names of engines and other processes."""
    ranks = sorted({int(match[1]) for name in names if (match := re.fullmatch(r"rank (\d+)", name))})
    others = sorted({name for name in names if not re.fullmatch(r"rank \d+", name)})
    parts = [f"rank{'s' if len(ranks) > 1 else ''} {list_ranks(ranks)}"] if ranks else []
    return ", ".join([*parts, *others])


def classes(stacks: Iterable[Stack]) -> Mapping[tuple[str, str], list[str]]:
    """Return a dict from (activity, the two innermost frames as one text) to the processes with such a stack.

    The key with the most processes comes first.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for stack in stacks:
        key = (_doing(stack), " < ".join(stack.frames[:2]))
        names.setdefault(key, []).append(str(stack.process))
    return dict(sorted(names.items(), key=lambda item: -len(item[1])))


def _doing(stack: Stack) -> str:
    """Describe what a thread does: "the engine waits for requests", "collective all_reduce", "running"."""
    _, is_message, words = stack.detail.partition("a message: ")
    return words if is_message else f"{stack.activity} {stack.detail}".strip() or "running"
