"""Decide which frame of a stack is the call site of a collective."""

from __future__ import annotations

from types import CodeType

_NOT_A_CALL_SITE = (
    "parallel/comm.py",
    "contextlib.py",
    "repro/trace/recording/recorder.py",
)  # frames between the caller and the observer
_LIBRARIES = (
    "packages/torch/",
    "repro/attach/record/",
    "repro/attach/vllm/",
)  # in a user's program, the call site is in the user's code


def is_between(code: CodeType) -> bool:
    """Whether code belongs to the recorder or to a library between the recorder and the call site."""
    path = code.co_filename
    return path.endswith(_NOT_A_CALL_SITE) or any(part in path for part in _LIBRARIES)
