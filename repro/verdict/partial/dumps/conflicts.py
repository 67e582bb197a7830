"""Find contradictions between a rank's stack and its Flight Recorder dump."""

from __future__ import annotations

from repro.verdict.partial.job_records import JobRecords
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


def stacks_against_dumps(job: JobRecords) -> list[str]:
    """Return sentences on ranks whose stack and dump disagree: only one of the two shows an unfinished operation.

    At most three ranks get a sentence.
    """
    lines = []
    for rank, stacks in job.main_stacks().items():
        dump = job.recorders.get(rank)
        if dump is None:
            continue
        stack = stacks[-1]
        pending = [call for record in dump.groups if (call := record.pending) is not None]
        place = program_frames(stack.frames, 1) or (stack.frames[0] if stack.frames else "?")
        if pending and stack.activity in ELSEWHERE and dump.backend == "gloo":
            lines.append(
                f"The dump of rank {rank} shows {pending[0].op} unfinished ({dump.source}), but its stack is in "
                f"{place} ({stack.source}): dump and stack are of different moments, or the operation is asynchronous."
            )
        elif not pending and stack.activity == "collective":
            lines.append(
                f"The stack of rank {rank} is in {stack.detail} ({stack.source}), but its dump shows no unfinished "
                f"operation ({dump.source}): dump and stack are of different moments, or the recorder does not see "
                "this operation (pynccl, CUDA graphs, gloo transfers)."
            )
    return lines[:3]
