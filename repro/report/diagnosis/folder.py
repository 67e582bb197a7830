"""Write the folder of a diagnosis: run.json, verdict.json, report.html, ISSUE.md, and the records of the evidence.

With the records, `hmr diagnose FOLDER` can repeat the diagnosis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repro.ingest import saved
from repro.ingest.read import Evidence
from repro.report.diagnosis.issue import issue
from repro.report.diagnosis.page import page
from repro.store.description import MAX_RANKS, RUN_FOLDER, Command, RunDescription
from repro.store.run_dir import write_atomically, write_json
from repro.store.schema import to_json
from repro.store.text import escape_lines
from repro.verdict.partial import Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.result import Verdict
from repro.watch.document import describe

TITLE = "diagnosis"
QUOTED = "This text quotes the files without changes: read it before you publish it."
AGAIN = ("python", "-m", "repro", "diagnose", RUN_FOLDER)


def write(
    folder: Path, diagnosis: Diagnosis, evidence: Evidence, alone: Mapping[str, Diagnosis], closing: str = QUOTED
) -> None:
    """Write the folder of a diagnosis. Raises OSError.

    alone: for each path that the user gave, the diagnosis of this path alone; ISSUE.md shows these in a table
    closing: the last line of ISSUE.md
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = JobRecords.of(evidence.records)
    size = max([job.world_size() or 1, *(rank + 1 for rank in job.ranks())])
    again = Command("judge the records in this folder again", AGAIN)
    described = RunDescription(TITLE, min(size, MAX_RANKS), quiet_window_s=1.0, deadline_s=1.0, commands=(again,))
    saved.save(folder, evidence)
    write_json(folder / "run.json", described.to_mapping())
    write_json(folder / "verdict.json", document(diagnosis, evidence))
    write_page(folder, diagnosis, evidence)
    text = issue(diagnosis.headline(), diagnosis, evidence, job, {name: one.headline() for name, one in alone.items()})
    write_atomically(folder / "ISSUE.md", escape_lines(f"{text}\n\n{closing}") + "\n")


def write_page(folder: Path, diagnosis: Diagnosis, evidence: Evidence) -> Path:
    """Write report.html and return its path. Raises OSError."""
    write_atomically(folder / "report.html", page(diagnosis, evidence, JobRecords.of(evidence.records)))
    return folder / "report.html"


def document(diagnosis: Diagnosis, evidence: Evidence) -> dict[str, Any]:
    """Return the content of verdict.json and of `diagnose --json`.

    It has all fields that the verdict.json of a run has, and also the fields of the diagnosis.
    """
    verdict = Verdict(
        diagnosis.verdict, diagnosis.cause, diagnosis.culprits, diagnosis.suspects,
        evidence=diagnosis.evidence, confidence=diagnosis.confidence,
    )  # fmt: skip
    return {
        **to_json(describe(verdict, scenario=TITLE)),
        **diagnosis.to_json(),
        "waits": [{"why": wait.get("source", ""), **wait} for wait in diagnosis.waits],
        "files": evidence.files,
        "not_understood": evidence.not_understood,
    }
