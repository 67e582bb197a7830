"""Judge a run of the lab by its witnesses, if the user gave its run directory or bundle to `diagnose`."""

from __future__ import annotations

from pathlib import Path

from hybrid_moe_ref.config import ConfigError
from repro import bundle
from repro.ingest.read import Evidence
from repro.lab.outcome.second_judgement import judge_again
from repro.lab.settings import read_settings
from repro.store.run_dir import RunDir
from repro.store.schema import to_json
from repro.verdict.partial import Diagnosis


def judge(path: Path) -> tuple[Diagnosis, Evidence]:
    """Judge the run directory or bundle at ``path`` from its files.

    Returns the verdict as a Diagnosis, which `diagnose` can print, and an Evidence that only lists the run's files.
    Raises the same errors as `watch` for a damaged run.
    """
    with bundle.opened(path) as root:
        run_dir = RunDir(root)
        try:
            settings = read_settings(run_dir.config)
        except OSError as error:
            raise ConfigError(f"not a run directory: {error.strerror}", str(run_dir.config)) from error
        document, _ = judge_again(run_dir, settings)
        files = sorted(str(file.relative_to(root)) for file in (root / "events").iterdir() if file.is_file())
    diagnosis = Diagnosis(
        document.verdict, document.cause or "", document.culprits, document.suspects, document.confidence,
        document.sentences, document.evidence, waits=tuple(map(to_json, document.waits)),
    )  # fmt: skip
    return diagnosis, Evidence(files=files)
