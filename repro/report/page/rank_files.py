"""Collect the texts that each rank left (stacks, logs, environment). Ranks with equal texts share one `RankText`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from repro.report.gather import RunData
from repro.store.run_dir import read_text
from repro.store.text import short_site

_MOST_BYTES = 20_000


@dataclass(frozen=True)
class RankText:
    """A text, and all ranks that left exactly this text."""

    ranks: tuple[int, ...]
    text: str

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def innermost(self) -> str:
        """Return the first frame of a stack, the innermost one."""
        lines = (line.strip() for line in self.text.splitlines())
        return next((line for line in lines if line.startswith("File")), "")


def stacks(data: RunData) -> list[RankText]:
    """Return the Python stacks of the ranks' main threads. Ranks with equal stacks share one `RankText`."""
    return _merge(data, lambda rank: main_stack(read_text(data.run_dir.stack(rank))))


def logs(data: RunData) -> list[RankText]:
    return _merge(data, lambda rank: _read(data.run_dir.log(rank)))


def launcher_log(data: RunData) -> str:
    return _read(data.run_dir.launcher_log)


def environments(data: RunData) -> list[RankText]:
    """Return which software the ranks loaded: versions and paths. Ranks with equal software share one `RankText`."""
    return _merge(data, lambda rank: read_text(data.run_dir.environment(rank)))


def config(data: RunData) -> str:
    return _read(data.run_dir.config)


def main_stack(text: str) -> str:
    """Return the stack of the main thread, which is the last one in a faulthandler dump. Paths are shortened."""
    thread = re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[-1]
    frames = [line for line in thread.splitlines() if line.startswith("  ")]
    return "\n".join(re.sub(r'"([^"]*)"', lambda path: f'"{short_site(path.group(1))}"', line) for line in frames)


def _read(path: Path) -> str:
    return read_text(path, _MOST_BYTES)


def _merge(data: RunData, text_of: Callable[[int], str]) -> list[RankText]:
    ranks_of: dict[str, list[int]] = {}
    for rank in range(data.num_ranks):
        text = text_of(rank)
        if text.strip():
            ranks_of.setdefault(text, []).append(rank)
    return [RankText(tuple(ranks), text) for text, ranks in ranks_of.items()]
