"""The entry point ``hmr_guard`` of ``vllm.general_plugins``: HMR_GUARD=agree stops ranks that would hang.

With HMR_GUARD=observe the guard only prints what it would refuse. vLLM calls the entry point in each of its processes,
possibly several times.
"""

from __future__ import annotations

import os

MODES = ("observe", "agree")


def register() -> None:
    """Install the guard's hooks in this process. If this fails, print why; no exception reaches the server."""
    mode = os.environ.get("HMR_GUARD")
    if not mode:
        return
    if mode not in MODES:
        from repro.attach.notice import notice

        notice(f"repro guard: off: HMR_GUARD is {mode!r}; set it to observe or agree")
        return
    try:
        from repro.attach.vllm.guard import hooks

        hooks.install()
    except Exception as error:
        from repro.attach.notice import notice

        notice(f"repro guard: off in this process: {type(error).__name__}: {error}")
