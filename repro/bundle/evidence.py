"""Make a bundle from the evidence of any job: redact the records, and diagnose the job from the redacted records only.

No file of the job is copied. Text that no reader understands is not in the records, so it cannot be in the bundle.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from repro.bundle.archive import pack
from repro.bundle.assemble import SCHEMA_VERSION, Made
from repro.bundle.leaks import private_values, refuse_leaks
from repro.bundle.redact.recognise import Recogniser, distinct, this_machine
from repro.bundle.redact.records import hosts_of, redact_evidence
from repro.bundle.redact.search import Search, literals_of
from repro.bundle.scratch import scratch_folder
from repro.ingest.read import Evidence
from repro.report.diagnosis import folder as diagnosis_folder
from repro.verdict.partial import Diagnosis, diagnose

COMPARED = ("verdict", "cause", "culprits", "suspects", "confidence")


def make_of_evidence(
    evidence: Evidence, path: Path, with_logs: bool = False, others: Mapping[str, Evidence] | None = None
) -> Made:
    """Write the bundle of a job's evidence into the zip ``path``.

    with_logs: also keep text that is not known to be harmless, such as log messages, if a search finds nothing in it
    that could be private
    others: by name, the evidence of further runs with one setting changed; ISSUE.md then has a table of all verdicts

    Raises LeakError if a private name was found, OSError if the zip cannot be written.
    """
    runs = {"this run": evidence, **(others or {})}
    hosts = [*dict.fromkeys(host for run in runs.values() for host in hosts_of(run.records)), *this_machine()]
    private = distinct({*private_values(os.environ), *hosts, *(name.partition(".")[0] for name in hosts)})
    recogniser = Recogniser(private, Search({*literals_of(os.environ), *private}) if with_logs else None)
    for name in hosts:
        recogniser.name_host(name)
    redacted = redact_evidence(evidence, recogniser)
    diagnosis = diagnose(redacted.records)
    notes = [f"{name} is {after} by the bundle's records, but {before} by the original files"
             for name, after, before in _differences(diagnosis, diagnose(evidence.records))]  # fmt: skip
    alone = _alone(runs, recogniser) if others else {}
    with scratch_folder("repro-bundle-") as folder:
        closing = (
            f"`python -m repro diagnose ZIP` judges the attached records again. {recogniser.left_out.total()} names, "
            "lines and fields that are not known to be harmless are left out or replaced."
        )
        diagnosis_folder.write(folder, diagnosis, redacted, alone, closing)
        refuse_leaks(folder, private | {str(folder)})
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "scenario": diagnosis_folder.TITLE,
            "verdict": diagnosis.verdict,
            "cause": diagnosis.cause or "",
            "left_out": dict(sorted(recogniser.left_out.items())),
            "with_logs": with_logs,
        }
        size = pack(folder, path, manifest)
    return Made(path, size, dict(recogniser.left_out), notes)


def _differences(after: Diagnosis, before: Diagnosis) -> Iterable[tuple[str, object, object]]:
    for name in COMPARED:
        if getattr(after, name) != getattr(before, name):
            yield name, getattr(after, name), getattr(before, name)


def _alone(runs: Mapping[str, Evidence], recogniser: Recogniser) -> dict[str, Diagnosis]:
    """Return, for the name of each run, the diagnosis of only this run.

    A name that is not known to be harmless is replaced by the number of the run.
    """
    return {
        recogniser.recognised(name) or f"run {number}": diagnose(redact_evidence(evidence, recogniser).records)
        for number, (name, evidence) in enumerate(runs.items(), 1)
    }
