"""Start recording when a Python interpreter starts, if HMR_RECORD is set; then run the environment's sitecustomize.

Python runs only the first sitecustomize on sys.path, which is this file. So this file runs the environment's own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


def _record() -> None:
    """Start recording. Let Python find this project's packages even if the program's environment lacks them."""
    from importlib.machinery import PathFinder

    root = os.path.abspath(os.path.join(_HERE, *[os.pardir] * 4))

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            return PathFinder.find_spec(name, [root]) if name in ("repro", "hybrid_moe_ref") else None

    sys.meta_path.append(Finder)
    try:
        from repro.attach.record import start

        start.begin(os.environ["HMR_RECORD"])
    except Exception as error:
        import contextlib

        with contextlib.suppress(Exception):  # as in repro.attach.notice, which may be what cannot be imported
            sys.stderr.write(f"repro record: this process is not recorded: {type(error).__name__}: {error}\n")


def _run_next() -> None:
    """Run the sitecustomize module of the program's environment, which Python itself does not run any more."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    places = [place for place in sys.path if os.path.abspath(place or os.curdir) != _HERE]
    spec = PathFinder.find_spec("sitecustomize", places)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("HMR_RECORD"):
    _record()
_run_next()
