"""Compare PyTorch's Flight Recorder dumps with the witnesses.

PyTorch records the collectives of a rank in its Flight Recorder, and our recorder records them in the witness. If the
dump of the Flight Recorder and the witness show the same pending collective, the rank's position is certain. If the
dump shows a pending collective of the same group with a higher number, dump and witness do not contradict each other,
because the two count differently: for a call that consists of several collectives, the Flight Recorder counts each of
them. If the dump has no collective of this group, the dump is ignored. In all other cases the dump contradicts the
witness, and the rank's position is not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from repro.store.run_dir import RunDir, read_json
from repro.verdict.result import Position, name_ranks

_NAMES = {"default_pg": "world"}
"""Flight Recorder's name of a group -> the name of the same group in our witnesses, where the two names differ."""


@dataclass
class RecorderCheck:
    """What the Flight Recorder dumps of the blocked ranks say about the collectives in which these ranks wait.

    agree          ranks whose dump and witness show the same pending collective
    ahead          ranks whose dump shows a pending collective of the same group with a higher number
    contradicted   rank -> a line that names the pending collectives in the dump, and the different one in the witness
    """

    agree: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    contradicted: dict[int, str] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Return at most two sentences: one for ``agree``, one for ``ahead``; none if a list is empty."""
        lines = []
        if self.agree:
            lines.append(f"{name_ranks(self.agree)}: the Flight Recorder has the same collective pending")
        if self.ahead:
            lines.append(
                f"{name_ranks(self.ahead)}: the Flight Recorder has a collective of the same group pending, under a "
                "higher number: it counts each collective within a call separately"
            )
        return lines


def compare_dumps(run_dir: RunDir, positions: Iterable[Position]) -> RecorderCheck:
    """Compare, for each rank that waits in a collective, its Flight Recorder dump with its witness.

    A dump that has no entry of the collective's group is ignored.

    positions   where each rank is, according to its witness; ranks that do not wait in a collective are skipped
    """
    check = RecorderCheck()
    for position in positions:
        if position.state != "blocked":
            continue
        entries = _read_entries(run_dir.flight_recorder(position.rank))
        if not any(group == position.group for group, _, _ in entries):
            continue
        pending = [(group, seq) for group, seq, retired in entries if not retired]
        if (position.group, position.seq) in pending:
            check.agree.append(position.rank)
        elif any(group == position.group and seq > position.seq for group, seq in pending):
            check.ahead.append(position.rank)
        else:
            listed = ", ".join(f"{group} #{seq}" for group, seq in pending) or "nothing"
            check.contradicted[position.rank] = (
                f"the Flight Recorder has {listed} pending, the witness {position.group} #{position.seq}"
            )
    return check


def _read_entries(dump: Path) -> list[tuple[str, int, bool]]:
    """Read (group, sequence number, whether the collective has completed) of each entry of a dump.

    Returns [] if the dump is missing or cannot be read.

    The field ``retired`` shows the completion. The field ``state`` does not: on gloo it stays "scheduled".
    """
    try:
        document = read_json(dump)
        return [
            (_group(str(entry["process_group"][1])), int(entry["collective_seq_id"]), bool(entry["retired"]))
            for entry in document["entries"]
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []


def _group(name: str) -> str:
    return _NAMES.get(name, name)
