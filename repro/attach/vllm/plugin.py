"""The entry point ``hmr_record`` of ``vllm.general_plugins``: record vLLM's ranks if HMR_RECORD names a folder.

vLLM calls this in each of its processes (front end, EngineCore, worker, the registry's inspection of a model), before
the process uses the classes that the hooks replace. vLLM may call it again.
"""

from __future__ import annotations

import os
import sys


def register() -> None:
    """Install the recorder's hooks in this process. Exceptions never reach the server."""
    directory = os.environ.get("HMR_RECORD")
    if not directory:
        return
    try:
        from repro.attach.vllm import hooks

        hooks.install(directory)
    except Exception as error:
        print(f"repro record: this process is not recorded: {type(error).__name__}: {error}", file=sys.stderr)
