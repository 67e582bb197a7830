"""`diagnose` on evidence as users attach it: the class that it supports, no innocent rank, and what it must mention."""

from __future__ import annotations

import pytest
from foreign import write
from reports import REPORTS

from repro.ingest.read import read
from repro.verdict.partial import diagnose


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_gets_the_class_that_its_files_support_and_names_no_innocent_rank(tmp_path, name):
    made = REPORTS[name]()
    diagnosis = diagnose(read([write(tmp_path, made.files)]).records)
    text = "\n".join(
        [*diagnosis.summary, *diagnosis.evidence, *diagnosis.refutes, *diagnosis.collect, *diagnosis.notes]
    )
    assert diagnosis.verdict in made.classes, diagnosis
    assert set(diagnosis.culprits) <= made.may_name, diagnosis
    assert diagnosis.culprits or not made.must_name, diagnosis
    assert not [word for word in made.mentions if word.lower() not in text.lower()], diagnosis
