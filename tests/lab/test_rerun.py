"""The commands that a report and a bundle print do the run again exactly, and the issue's text keeps its shape."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from reported import write_hang

from repro import report
from repro.bundle import issue
from repro.commands import cli
from repro.commands import run as run_command
from repro.lab.description import describe
from repro.lab.rank.worker import _parse
from repro.lab.scenarios import settings_of
from repro.report.commands import commands, place
from repro.report.gather import gather
from repro.store.run_dir import write_json

CHANGES = [
    {},
    {"num_ranks": 4, "seed": 3, "deadline_s": 60.0, "quiet_window_s": 0.5, "checks": "agree"},
    {"seed": -3, "variant": "fix", "checks": "strict"},
    {"kernel_cache": "split", "group_timeout_s": 3.0, "allow_unsafe": True},
    {"tp_size": 2, "drawn_for": 8},
    {"expert_parallel": False},
    {"model": {"layer_pattern": "GA"}, "workload": {"max_requests": 1}},
    {"engine": {"gdn_prefill_backend": "jit", "moe_backend": "jit"}},
    {"engine": {"gdn_prefill_backend": "jit", "mode": "graphs"}, "kernel_cache": "warm"},
    {"num_ranks": 1024, "model": {"num_experts": 1024}},
    {"scenario": "cold_jit"},
    {"scenario": "kernel_stall"},
    {"scenario": "cold_jit", "checks": "agree", "group_timeout_s": 2.5},
    {"scenario": "config2", "kernel_cache": "warm"},
]


@pytest.mark.parametrize(
    ("changes", "named"), [*((changes, "") for changes in CHANGES), (CHANGES[6], "a folder/of $mine")]
)
def test_the_commands_run_with_the_very_same_settings(tmp_path, monkeypatch, changes, named):
    monkeypatch.chdir(tmp_path)
    names = {"scenario": "metadata_rebuild", "variant": "fault"}
    parts = {name: changes[name] for name in ("model", "engine", "workload") if name in changes}
    rest = {name: value for name, value in changes.items() if name not in parts}
    settings = settings_of({**names, **rest}, parts)
    root, _ = write_hang(tmp_path / "runs", 2)
    write_json(root / "config.json", settings.to_mapping())
    write_json(root / "run.json", describe(settings).to_mapping())
    facts = gather(root)
    if named:
        facts.place = named
        (tmp_path / named).parent.mkdir(exist_ok=True)
        (tmp_path / named).symlink_to(root)
    (_, first), (_, of_all), *by_torchrun, (_, watch) = commands(facts)
    again = shlex.split(first)
    assert again[:3] == ["python", "-m", "repro"]
    args = cli.parser_of(again[3:]).parse_args(again[3:])
    assert run_command.settings_of(args, args.scenario, args.variant) == settings
    assert shlex.split(of_all) == ["all" if word == settings.variant else word for word in again]
    if by_torchrun:
        words = shlex.split(by_torchrun[0][1])
        assert words[:2] == ["torchrun", "--nproc-per-node"] and words[3:5] == ["-m", "repro.worker"]
        assert _parse(words[5:], int(words[2]))[0] == settings
    else:
        assert changes.keys() & {"tp_size", "expert_parallel", "model"} or "mode" in changes.get("engine", {})
    assert (tmp_path / shlex.split(watch)[-1]).resolve() == root.resolve()


def test_a_run_elsewhere_is_named_by_its_whole_path(tmp_path, monkeypatch):
    root, _ = write_hang(tmp_path / "runs", 2)
    facts = gather(root)
    monkeypatch.chdir(tmp_path)
    assert place(facts) == f"runs/{root.name}"
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert place(facts) == str(root.resolve())


def test_the_longest_issue_has_every_part_and_ends_its_blocks(tmp_path):
    root, _ = write_hang(tmp_path, 16)
    verdict = json.loads((root / "verdict.json").read_text())
    for number, position in enumerate(verdict["ranks"]):
        position["layer"] = f"layers.{number}.moe"
        (root / "env" / f"rank{number:03d}.txt").write_text(f"torch: {number % 5}\n```\n" + "module x: 1\n" * 40)
    verdict["waits"] = [{"ranks": [n], "waits_in": f"ep x #{n}", "for": [n + 1], "why": "\n# x"} for n in range(9)]
    verdict["evidence"] += [f"rank {n} left its schedule" for n in range(9)]
    verdict["scenario"] = "a\n# b"
    (root / "verdict.json").write_text(json.dumps(verdict))
    facts = report.write(root, [], issue.UNPACKED)
    (root / "repro.py").write_text("")
    others = [gather(root), gather(root)]
    lines = issue.issue(facts, others).splitlines()
    assert len(lines) <= issue.MAX_ISSUE_LINES, len(lines)
    assert [line for line in lines if line.startswith("#")] == ["# deadlock in a # b: extra"]
    text = "\n".join(lines)
    for heading in (
        "Claim",
        "Command",
        "Which ranks wait for which",
        "Variants `control` and `fix`",
        "What is not shown",
        "Versions",
    ):
        assert f"**{heading}" in text, heading
    assert lines[-1].startswith("Attached:") and text.count("```") == 4
    assert "7 more places" in text and "and 2 more groups of ranks" in text
    (command,) = [line for line in lines if line.startswith("python -m repro run")]
    assert not re.search(r"&lt;|\\\[|…", command)


def test_versions_of_ranks_that_are_alike_stand_once(tmp_path):
    root, _ = write_hang(tmp_path, 4)
    for rank in range(4):
        (root / "env" / f"rank{rank:03d}.txt").write_text("torch: 1\nNCCL: 2\n" if rank < 3 else "torch: 1\nNCCL: 3\n")
    versions = issue._versions(gather(root))
    assert versions == ["ranks 0-2:", "torch: 1", "NCCL: 2", "rank 3:", "torch: 1", "NCCL: 3"]
