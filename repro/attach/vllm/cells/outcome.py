"""The outcome of a cell (one start of vLLM), and the file in which it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid_moe_ref.files import DamagedFile
from repro.store.run_dir import write_json
from repro.store.schema import read_typed

READY, HUNG, ENDED, LIMIT, NOT_RUN, INTERRUPTED = "ready", "hung", "ended", "limit", "not run", "interrupted"
STATES = (READY, HUNG, ENDED, LIMIT, NOT_RUN, INTERRUPTED)
FILE = "outcome.json"


@dataclass(frozen=True)
class Answer:
    """What the recorder or `collect` says about a server.

    verdict    the verdict's class, such as "deadlock", see repro.verdict.classes
    sentences  where the ranks wait
    """

    verdict: str
    cause: str = ""
    culprits: tuple[int, ...] = ()
    suspects: tuple[int, ...] = ()
    sentences: tuple[str, ...] = ()

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Answer:
        """Read the answer from the JSON of `watch`, `collect` or `diagnose`."""
        culprits, suspects, sentences = (document.get(key) or () for key in ("culprits", "suspects", "sentences"))
        return cls(
            str(document["verdict"]), document.get("cause") or "", tuple(culprits), tuple(suspects), tuple(sentences)
        )

    def where(self) -> str:
        """Return the first sentence that names the first culprit, else the first sentence, else ""."""
        names = [f"rank {rank} " for rank in self.culprits[:1]]
        about = (text for text in self.sentences if any(name in f"{text} " for name in names))
        return next(about, self.sentences[0] if self.sentences else "")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one cell (one start of vLLM).

    name      name of the cell
    state     how the start ended: one of STATES, such as "ready" or "hung"
    verdict, cause, culprits    the verdict on the start; `verdict` is "" if the cell did not run
    where     a sentence that says where a rank waits; "" if none is known
    seconds   from the start of the server until `state` was known
    silent_s  the longest time, in seconds, in which no rank recorded an event
    looked    the classes of the verdicts of `collect`, one for each run of `collect`
    cache     the folder with the compiled kernels of this start; "" if the cell did not run
    partial   whether this warm start used the cache of a cold start whose server did not become ready
    bundles   names of the zip files that `bundle` wrote
    reason    why the cell did not run; "" if it ran
    notes     what went wrong in the experiment itself
    """

    name: str
    state: str
    verdict: str = ""
    cause: str = ""
    culprits: tuple[int, ...] = ()
    where: str = ""
    seconds: float = 0.0
    silent_s: float = 0.0
    looked: tuple[str, ...] = ()
    cache: str = ""
    partial: bool = False
    bundles: tuple[str, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def finished(self) -> bool:
        """Whether the outcome is final, so that no later `hmr cells` starts the cell again.

        An outcome is final if the cell was started and not interrupted.
        """
        return self.state not in (NOT_RUN, INTERRUPTED)

    def save(self, folder: Path) -> None:
        """Write the outcome into the folder of the cell. Raises OSError."""
        write_json(folder / FILE, asdict(self), durable=True)

    @classmethod
    def load(cls, folder: Path) -> Outcome | None:
        """Read the outcome in the folder of a cell; None if the folder has no outcome. Raises DamagedFile."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            outcome = read_typed(path, cls)
        except ValueError as error:
            raise DamagedFile(
                f"{path}:1: not the outcome of a cell: {error}; remove this file to run the cell again"
            ) from None
        if outcome.state not in STATES:
            raise DamagedFile(f"{path}:1: unknown state {outcome.state!r}; remove this file to run the cell again")
        return outcome


def conclude(state: str, recorder: Answer | None, looks: Sequence[Answer], silent_s: float, window_s: float) -> Answer:
    """Return the verdict on a start, from the answers of the recorder and of `collect` (``looks``).

    - The server became ready: `slow` if ``silent_s`` is at least ``window_s``, else `clean`.
    - The server reached the time limit: the last verdict of `collect`, but `slow` instead of `clean`.
    - Any other state: the verdict of the recorder. If the recorder gave none, or gave `inconclusive`, the last verdict
      of `collect`. If both gave the same verdict and the recorder names no culprits, the culprits, suspects and
      sentences are those of `collect`.

    If the needed answer is missing, the verdict is `inconclusive`.

    state     how the start ended, one of STATES
    silent_s  the longest time, in seconds, in which no rank recorded an event
    window_s  the number of seconds without an event after which `collect` runs
    """
    last = looks[-1] if looks else None
    if state == READY:
        if silent_s < window_s:
            return Answer("clean")
        named = [look for look in looks if look.verdict == "slow" and look.culprits]
        return named[-1] if named else Answer("slow", sentences=last.sentences if last else ())
    if state == LIMIT:
        if last is None:
            return Answer("inconclusive", sentences=("The server was not ready in time, and collect gave no verdict.",))
        if last.verdict == "clean":
            return Answer("slow", sentences=last.sentences)
        return last
    if recorder is None:
        return last or Answer("inconclusive")
    if last is not None and recorder.verdict == "inconclusive":
        return last
    if last is not None and recorder.verdict == last.verdict and not recorder.culprits:
        return Answer(last.verdict, recorder.cause or last.cause, last.culprits, last.suspects, last.sentences)
    return recorder
