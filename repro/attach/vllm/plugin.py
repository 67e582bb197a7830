"""The entry point ``hmr_record`` of ``vllm.general_plugins``: record vLLM's ranks if HMR_RECORD names a folder.

vLLM calls ``register`` in each of its processes (front end, EngineCore, worker, and the process in which the model
registry inspects a model), before the process uses the classes that the hooks replace. vLLM can call ``register``
several times in one process.
"""

from __future__ import annotations

import os


def register() -> None:
    """Install the recorder's hooks in this process. If this fails, print why; no exception reaches the server."""
    directory = os.environ.get("HMR_RECORD")
    if not directory:
        return
    try:
        _compile_hooks()
        from repro.attach.vllm import hooks

        hooks.install(directory)
    except Exception as error:
        from repro.attach.notice import notice

        notice(f"repro record: this process is not recorded: {type(error).__name__}: {error}")


def _compile_hooks() -> None:
    """Compile the hooks of collectives, unless they are in the cache. If that fails, switch to the hooks in Python.

    The processes that this process starts then use the hooks in Python, too.
    """
    if os.environ.get("HMR_RECORD_PURE") == "1":
        return
    from repro.attach.record import compiled

    if problem := compiled.build():
        os.environ["HMR_RECORD_PURE"] = "1"  # the processes that this one starts need not try again
        from repro.attach.notice import notice

        notice(f"repro record: a step takes some percent longer without the compiled hooks: {problem}")
