"""`diagnose` on evidence as users attach it: the class that it supports, no innocent rank, and what it must mention."""

from __future__ import annotations

import re
import subprocess

import pytest
from foreign import write
from hangs import CASES
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


def test_each_command_to_collect_is_one_that_a_shell_can_read(tmp_path):
    """The command is what follows the first ": ", so that a person can paste it."""
    commands = set()
    for name, files in {**{name: make().files for name, make in REPORTS.items()},
                        **{name: make([0, 1, 2, 3]).files for name, make in CASES.items()}}.items():  # fmt: skip
        for text in diagnose(read([write(tmp_path / name, files)]).records).collect:
            command = text.partition(": ")[2]
            if re.match(r"(?:for|ps|cat|dmesg|ncclras|nvidia-smi) ", command):
                commands.add(command)
    assert len(commands) >= 6
    script = "\n".join(sorted(commands))
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr + script
    assert not [command for command in commands if re.search(r"; and |, and | on its host", command)]
