"""Functions that write ranks, calls and frames as text, for the sentences of a diagnosis."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from repro.trace.foreign.records import Call, Group
from repro.verdict.result import list_ranks

WORKING = ("building", "compiling", "loading", "saving", "data")
"""The activities (`Stack.activity`) of a rank that works, while other ranks may wait for it."""


def ranks_of(ranks: Iterable[int]) -> str:
    """Format ranks with their noun: "rank 3" or "ranks 0-5"."""
    listed = sorted(set(ranks))
    return f"rank{'s' if len(listed) != 1 else ''} {list_ranks(listed)}"


def verb(ranks: Sequence[int] | set[int], singular: str, plural: str) -> str:
    return singular if len(ranks) == 1 else plural


def call_in(call: Call, group: Group | None) -> str:
    """Format a call and its group: "all_gather #5310 of group 5", "recv from rank 6 of PIPELINE_GROUP"."""
    where = f" of {group}" if group is not None else ""
    if call.is_transfer:
        direction = "from" if call.op == "recv" else "to"
        return f"{call.op} {direction} rank {call.peer}{where}" if call.peer is not None else f"{call.op}{where}"
    number = f" #{call.seq}" if call.seq is not None else ""
    return f"{call.op}{number}{where}"


def arguments(call: Call) -> str:
    """Format the arguments of a call: "all_gather, sizes [25600000] [102400000], Float"."""
    sizes = " ".join(str(list(size)) for size in call.sizes)
    dtypes = ", ".join(dict.fromkeys(call.dtypes))
    return ", ".join(part for part in (call.op, f"sizes {sizes}" if sizes else "", dtypes) if part)


_LIBRARY = (
    "torch/distributed/",
    "torch/nn/modules/module.py",
    "torch/autograd/",
    "torch/_tensor.py",
    "torch/utils/_contextlib.py",
    "repro/attach/record/",
    "c10d_logger.py",
    "contextlib.py",
)


_PYTHON_FOLDER = re.compile(r"/lib(64)?/python3\.\d+/(?!(site|dist)-packages/)")


def program_frames(frames: Sequence[str], limit: int = 2) -> str:
    """Return the innermost frames of the program itself, without torch's frames: "unshard (train/fsdp.py:210)".

    If all of these frames are of Python's own library, also return the innermost frame of other code: "stat
    (pathlib.py:1013) < load (train.py:40)".

    limit   how many frames to return
    """
    own = [frame for frame in frames if not any(part in frame for part in _LIBRARY) and ".so" not in frame]
    shown = own[:limit]
    if shown and all(map(_is_of_python, shown)):
        shown += [frame for frame in own[limit:] if not _is_of_python(frame)][:1]
    return " < ".join(shown)


def _is_of_python(frame: str) -> bool:
    """Whether a frame is of Python's own library, by its file: "stat (pathlib.py:1013)", "/usr/lib/python3.11/…"."""
    file = frame.rpartition("(")[2].partition(":")[0]
    if file.startswith("/"):
        return bool(_PYTHON_FOLDER.search(file))
    return file.partition("/")[0].removesuffix(".py") in sys.stdlib_module_names
