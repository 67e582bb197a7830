"""Decide which frame of a stack is the call site of a collective: the innermost frame of the user's own code."""

from __future__ import annotations

from types import CodeType

# files of the model and of the recorder that lie between a call site and the recorder
_NOT_A_CALL_SITE = ("parallel/comm.py", "contextlib.py", "repro/trace/recording/recorder.py")
# folders of the libraries that lie between them in a user's program
_LIBRARIES = ("packages/torch/", "repro/attach/record/", "repro/attach/vllm/")


def is_between(code: CodeType) -> bool:
    """Whether a frame with this code is not the call site of a collective, but only leads from there to the recorder.

    True for code of the recorder, of the model's communicator, of the hooks in `repro.attach`, of torch and of
    contextlib.
    """
    path = code.co_filename
    return path.endswith(_NOT_A_CALL_SITE) or any(part in path for part in _LIBRARIES)
