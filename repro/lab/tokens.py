"""Compare the tokens that a run of the lab served with those of one process that ran the whole model."""

from __future__ import annotations

from collections.abc import Callable

from repro.store.run_dir import RunDir, read_tokens
from repro.verdict.result import name_ranks
from repro.watch.live import Comparison


def compare_tokens(
    run_dir: RunDir, num_ranks: int, tp_size: int, reference_alive: Callable[[], bool], final: bool
) -> Comparison | None:
    """Compare all ranks' outputs with reference.json; None while that file may still come, unless ``final``."""
    if not run_dir.reference.exists():
        if reference_alive() and not final:
            return None
        why = "is not ready" if reference_alive() else "failed (logs/reference.log)"
        return Comparison(missing=f"the single-process reference {why}")
    try:
        reference = read_tokens(run_dir.reference)
        wrong = wrong_tokens(run_dir, num_ranks, tp_size)
    except (OSError, ValueError) as error:
        return Comparison(missing=str(error))
    num_tokens = sum(map(len, reference.values()))
    text = f"{num_tokens} tokens of {len(reference)} requests equal the single-process reference's"
    return Comparison(wrong=tuple(wrong), evidence=text)


def wrong_tokens(run_dir: RunDir, num_ranks: int, tp_size: int) -> list[str]:
    """A line for each request whose tokens differ from the reference's, or that the wrong number of ranks served.

    Raises FileNotFoundError with the files that are missing, ValueError with one that is damaged.
    """
    has_reference = run_dir.reference.exists()
    reference = read_tokens(run_dir.reference) if has_reference else {}
    absent = [rank for rank in range(num_ranks) if not run_dir.output(rank).exists()]
    if absent or not has_reference:
        missing = [] if has_reference else ["reference.json is not there"]
        missing += [f"no output of {name_ranks(absent)} is there"] * bool(absent)
        raise FileNotFoundError(" and ".join(missing))
    served: dict[str, list[list[int]]] = {}  # the ranks of a tp group serve the same requests
    for rank in range(num_ranks):
        for name, tokens in read_tokens(run_dir.output(rank)).items():
            served.setdefault(name, []).append(tokens)
    lines = [_difference(name, copy, reference[name]) for name in reference for copy in served.get(name, [None])]
    for name, copies in served.items():
        if name not in reference:
            lines.append(f"request {name} is none of the single-process reference's")
        elif len(copies) != tp_size:
            lines.append(f"request {name} was served by {len(copies)} ranks, not by {tp_size}")
    return sorted({line for line in lines if line})


def _difference(name: str, served: list[int] | None, reference: list[int]) -> str:
    if served is None:
        return f"request {name} was not served"
    for index, (ours, theirs) in enumerate(zip(served, reference, strict=False)):
        if ours != theirs:
            return f"request {name}: token {index} is {ours}, {theirs} in the single-process reference"
    if len(served) != len(reference):
        return f"request {name}: {len(served)} tokens served, {len(reference)} in the single-process reference"
    return ""
