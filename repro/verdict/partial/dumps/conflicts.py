"""Find contradictions between the stack and the recorder dump of one rank."""

from __future__ import annotations

from repro.verdict.partial.scene import Scene
from repro.verdict.partial.words import program_frames

ELSEWHERE = (
    "building",
    "compiling",
    "loading",
    "saving",
    "data",
    "debugger",
    "lock",
    "idle",
    "answer",
    "sleep",
    "exit",
)


def stacks_against_dumps(scene: Scene) -> list[str]:
    """Return a sentence for each rank whose dump shows it in an operation but its stack does not, or the reverse."""
    lines = []
    for rank, stacks in scene.main_stacks().items():
        dump = scene.recorders.get(rank)
        if dump is None:
            continue
        stack = stacks[-1]
        pending = [call for record in dump.groups if (call := record.pending) is not None]
        place = program_frames(stack.frames, 1) or (stack.frames[0] if stack.frames else "?")
        if pending and stack.activity in ELSEWHERE and dump.backend == "gloo":
            lines.append(
                f"Rank {rank}'s dump shows {pending[0].op} unfinished ({dump.source}), and its stack stands in "
                f"{place} ({stack.source}): they are of different moments, or the operation is asynchronous."
            )
        elif not pending and stack.activity == "collective":
            lines.append(
                f"Rank {rank}'s stack is in {stack.detail} ({stack.source}), and its dump shows nothing unfinished "
                f"({dump.source}): they are of different moments, or the recorder does not see this operation "
                "(pynccl, CUDA graphs, gloo transfers)."
            )
    return lines[:3]
