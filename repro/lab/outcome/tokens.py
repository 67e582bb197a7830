"""Compare the tokens that a lab run served with the single-process reference."""

from __future__ import annotations

from collections.abc import Callable

from repro.store.run_dir import RunDir, read_tokens
from repro.store.text import escape_control_characters
from repro.verdict.result import name_ranks
from repro.watch.comparison import Comparison

MAX_LINES, MAX_NAME = 1000, 120
"""Largest number of lines about wrong requests, and of characters of a request's name in them."""


def compare_tokens(
    run_dir: RunDir, num_ranks: int, tp_size: int, reference_alive: Callable[[], bool], final: bool
) -> Comparison | None:
    """Compare the tokens that all ranks served with reference.json, the tokens of the single-process reference.

    If reference.json does not exist yet, but its writer still runs, returns None: call this again later.

    reference_alive  returns whether the process that writes reference.json still runs
    final            if True, this function never returns None: if reference.json is missing, the result says why
    """
    if not run_dir.reference.exists():
        if reference_alive() and not final:
            return None
        why = "is not ready" if reference_alive() else "failed (logs/reference.log)"
        return Comparison(missing=f"the single-process reference {why}")
    try:
        wrong = wrong_tokens(run_dir, num_ranks, tp_size)
        return Comparison(tuple(wrong), evidence=name_equal(run_dir))
    except (OSError, ValueError) as error:
        return Comparison(missing=run_dir.describe(error))


def name_equal(run_dir: RunDir) -> str:
    """Return the sentence that says how many tokens and requests equal the reference.

    Call this only if all tokens are equal: this function counts the tokens, and does not compare them. Raises OSError
    or DamagedFile if reference.json cannot be read.
    """
    reference = read_tokens(run_dir.reference)
    num_tokens = sum(map(len, reference.values()))
    return f"{num_tokens} tokens of {len(reference)} requests equal the single-process reference's"


def wrong_tokens(run_dir: RunDir, num_ranks: int, tp_size: int) -> list[str]:
    """Return a line for each request whose tokens differ from reference.json, or that too few or too many ranks served.

    Exactly ``tp_size`` ranks must serve a request, because the ranks of a tp group serve the same requests.

    Returns at most MAX_LINES lines. Raises FileNotFoundError, which names all missing files, or ValueError, which names
    a damaged file.
    """
    has_reference = run_dir.reference.exists()
    absent = [rank for rank in range(num_ranks) if not run_dir.output(rank).exists()]
    if absent or not has_reference:
        missing = [] if has_reference else ["reference.json is missing"]
        missing += [f"the output of {name_ranks(absent)} is missing"] * bool(absent)
        raise FileNotFoundError(" and ".join(missing))
    reference = read_tokens(run_dir.reference)
    num_copies = dict.fromkeys(reference, 0)  # the ranks of a tp group serve the same requests
    lines: set[str] = set()
    for rank in range(num_ranks):  # one rank at a time, because the files of a bundle can be large
        for name, tokens in read_tokens(run_dir.output(rank)).items():
            if name in num_copies:
                num_copies[name] += 1
            line = _difference(name, tokens, reference.get(name))
            if line and len(lines) < MAX_LINES:
                lines.add(line)
    for name, num in num_copies.items():
        if num != tp_size and len(lines) < MAX_LINES:
            served = f"was served by {num} ranks instead of {tp_size}" if num else "was not served"
            lines.add(f"{_request(name)} {served}")
    return sorted(lines)


def _difference(name: str, served: list[int], reference: list[int] | None) -> str:
    """Return a sentence that says how the ``served`` tokens differ from the ``reference``; "" if they are equal.

    name: the id of the request; reference: None if the reference has no such request
    """
    if reference is None:
        return f"{_request(name)} is not in the single-process reference"
    for index, (ours, theirs) in enumerate(zip(served, reference, strict=False)):
        if ours != theirs:
            return f"{_request(name)}: token {index} is {ours}, but {theirs} in the single-process reference"
    if len(served) != len(reference):
        return (
            f"{_request(name)}: {len(served)} tokens were served, but the single-process reference has {len(reference)}"
        )
    return ""


def _request(name: str) -> str:
    return f"request {escape_control_characters(name, MAX_NAME)}"
