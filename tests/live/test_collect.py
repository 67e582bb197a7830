"""`collect` on jobs that hold nothing of this project: it names who waits for whom, and the job goes on as before."""

from __future__ import annotations

import json

import pytest
from hanging import hung_jobs, look_at

from repro.commands.cli import main

ODD = 1
EXPECTED = {  # kind: class, cause, culprits, suspects, and words of a sentence
    "healthy": ("clean", None, [], [], "not a hang"),
    "uneven_batches": ("deadlock", "mismatch", [], [ODD], "gradient all-reduce"),
    "swallowed_exception": ("deadlock", "mismatch", [], [ODD], "rank 1 in barrier"),
    "saves": ("slow", "straggler", [ODD], [], "saves a checkpoint"),
    "busy": ("slow", "straggler", [ODD], [], "search (hung_jobs.py"),
    "build_under_lock": ("slow", None, [ODD], [], "cc1plus"),
    "abandoned_lock": ("deadlock", "lock", [], [], "no process holds"),
    "dead_peer": ("crash", "dead_rank", [ODD], [], "has ended"),
    "debugger": ("stall", "host", [ODD], [], "debugger prompt"),
    "stuck_loader": ("stall", "host", [ODD], [], "data loader"),
    "ring": ("deadlock", "order", [], [0, 1, 2], "recv from rank 2"),
    "stopped": ("stall", "host", [ODD], [], "stopped by a signal"),
    "crossed_groups": ("deadlock", "order", [], [ODD], "of group outer"),
    "slow_file": ("stall", "host", [ODD], [], "read_text"),
    "two_threads": ("stall", "host", [ODD], [], "take_both (hung_jobs.py"),
    "sleeps": ("stall", "host", [ODD], [], "sleeps (hung_jobs.py"),
    "waits_for_child": ("stall", "host", [ODD], [], "_wait (subprocess.py"),
    "missing_key": ("slow", "straggler", [ODD], [], "missing_key (hung_jobs.py"),  # the store of this job is polled
    "collects_garbage": ("slow", "straggler", [ODD], [], "collects_garbage (hung_jobs.py"),
    "monitored": ("deadlock", "mismatch", [], [ODD], "monitored_barrier"),
    "two_build": ("slow", None, [0, 2], [], "1 compiler: nvcc"),
}
SAME = ("verdict", "cause", "culprits", "suspects", "sentences")
QUICK = ["swallowed_exception", "abandoned_lock"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    with hung_jobs(QUICK, tmp_path_factory.mktemp("jobs")) as started:
        yield started


def check(document, kind):
    verdict, cause, culprits, suspects, words = EXPECTED[kind]
    named = document["verdict"], document["cause"], document["culprits"], document["suspects"]
    assert named == (verdict, cause, culprits, suspects), document
    assert any(words in text for text in (*document["sentences"], *document["evidence"])), document
    assert document["code"] == 0, document


@pytest.mark.parametrize("kind", QUICK)
def test_a_hung_job_is_looked_at_from_outside_and_who_waits_for_whom_is_named(jobs, kind, tmp_path, capsys):
    jobs[kind].wait_until_hung()
    document = look_at(jobs[kind], tmp_path, capsys)
    check(document, kind)
    (folder,) = tmp_path.glob("*-collect-*")
    capsys.readouterr()
    for path in (folder, tmp_path):  # its records, and the files that were collected
        assert main(["diagnose", "--json", str(path)]) == 0
        again = json.loads(capsys.readouterr().out)
        assert {key: again[key] for key in SAME} == {key: document[key] for key in SAME}, path


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in EXPECTED if kind not in QUICK])
def test_each_kind_of_hang_is_named(kind, tmp_path, capsys):
    with hung_jobs([kind], tmp_path) as started:
        started[kind].wait_until_hung()
        check(look_at(started[kind], tmp_path, capsys, 2.0), kind)
