"""`record`: a program of torch.distributed is recorded without a change to it, and never differs for it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import fails

from repro.attach.record import imports, rank
from repro.commands.record import SITE
from repro.trace.witness.file import read_dir
from repro.trace.witness.format import Kind

JOBS = Path(__file__).resolve().parents[1] / "support" / "jobs" / "recorded_jobs.py"


def record(to: Path, kind: str, *flags: str, ranks: int = 2, options: tuple[str, ...] = ()) -> tuple[int, str]:
    """Record a job; returns the exit code and what was printed."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, "-m", "repro", "record", "--to", str(to), "--end", *options, "--"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "LOCK_FILE": str(to.parent / "lock")}
    done = subprocess.run(
        [*command, *program, str(JOBS), kind, *flags], env=env, capture_output=True, text=True, timeout=110
    )
    return done.returncode, done.stdout + done.stderr


def verdict_of(to: Path) -> dict:
    return json.loads((to / "verdict.json").read_text())


def test_a_lock_held_across_a_barrier_is_named_with_its_holder(tmp_path):
    code, printed = record(tmp_path / "run", "lock", "--fault", options=("--quiet-window", "1.5"))
    document = verdict_of(tmp_path / "run")
    assert (document["verdict"], document["cause"], document["culprits"]) == ("deadlock", "lock", [0]), printed
    assert code == 1, printed
    assert f"holds lock {tmp_path / 'lock'}" in printed, printed
    assert (tmp_path / "run" / "report.html").is_file()
    assert list((tmp_path / "run" / "stacks").glob("*.txt")), "the ranks were asked for their stacks, without a signal"


def test_nothing_of_ours_is_imported_unless_a_recording_is_asked_for():
    shown = "import sys; print([name for name in sys.modules if name.split('.')[0] in ('repro', 'hybrid_moe_ref')])"
    env = {name: value for name, value in os.environ.items() if not name.startswith("HMR_")}
    done = subprocess.run(
        [sys.executable, "-c", shown], env={**env, "PYTHONPATH": str(SITE)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_sitecustomize_that_is_hidden_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    env = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{tmp_path}"}
    for variables in ({}, {"HMR_RECORD": str(tmp_path / "run")}):
        done = subprocess.run([sys.executable, "-c", ""], env={**env, **variables}, capture_output=True, text=True)
        assert done.stdout.strip() == "theirs", done.stdout + done.stderr


def test_a_module_is_hooked_once_it_has_been_imported_and_a_hook_that_fails_harms_no_import(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "hooked_first.py").write_text("value = 1")
    (tmp_path / "hooked_second.py").write_text("value = 2")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    imports.after_import({
        "hooked_first": lambda module: setattr(module, "value", 10),
        "hooked_second": lambda module: module.nothing,
    })  # fmt: skip
    try:
        import hooked_first
        import hooked_second
    finally:
        sys.meta_path[:] = finders
    assert (hooked_first.value, hooked_second.value) == (10, 2)
    assert "hooked_second is not recorded: AttributeError" in capsys.readouterr().err
    assert type(hooked_first.__spec__.loader).__module__ == "_frozen_importlib_external"


def test_two_jobs_of_one_recording_have_a_folder_each(tmp_path):
    first = rank._folder_of_job(tmp_path, "a-2ranks")
    assert rank._folder_of_job(tmp_path, "a-2ranks") == first == tmp_path
    assert rank._folder_of_job(tmp_path, "b-4ranks") == tmp_path / "jobs" / "b-4ranks"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no program is given"),
        (["--", "no-such-program"], "no-such-program: cannot start"),
        (["--quiet-window", "-1", "--", "true"], "--quiet-window"),
        (["--to", "/proc/none", "--", "true"], "cannot write to /proc/none"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, message = fails(capsys, "record", *arguments)
    assert code == 2 and said in message, message


def test_the_exit_code_of_a_program_that_ends_by_itself_is_passed_on(tmp_path, capsys):
    code, message = fails(capsys, "record", "--to", tmp_path / "run", "--", "sh", "-c", "exit 7")
    assert code == 7
    assert "no rank of torch.distributed began" in message


# -- each kind of parallelism; a run takes some seconds of imports -----------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("kind", "ranks", "verdict", "culprits", "words"),
    [
        ("ddp", 4, "crash", None, "ddp_average_gradients"),
        ("fsdp", 4, "deadlock", [1], "all_gather_into_tensor"),
        ("tensor_parallel", 4, None, None, "rank 1"),
        ("mesh", 8, "deadlock", None, "mesh_ep"),
        ("compiled", 4, None, None, "rank 1"),
        ("fails", 4, "crash", [1], "the batch of rank 1 is empty"),
    ],
)
def test_a_fault_in_each_kind_of_parallelism_is_named(tmp_path, kind, ranks, verdict, culprits, words):
    _, printed = record(tmp_path / "run", kind, "--fault", ranks=ranks, options=("--quiet-window", "3", "--modules"))
    document = verdict_of(tmp_path / "run")
    assert verdict in (None, document["verdict"]), printed
    assert culprits in (None, document["culprits"]), printed
    assert words in printed, printed


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize("launcher", ["torchrun", "mp.spawn"])
def test_a_job_that_the_user_interrupts_has_not_crashed(tmp_path, launcher):
    (tmp_path / "job.py").write_text(
        "import sys, time, torch, torch.distributed as dist\n"
        "def main(rank, *given):\n"
        "    dist.init_process_group('gloo', *given, rank=rank, world_size=2)\n"
        "    while True:\n"
        "        dist.all_reduce(torch.ones(1))\n"
        "        time.sleep(0.05)\n"
        "if __name__ == '__main__':\n"
        "    if 'RANK' in __import__('os').environ:\n"
        "        main(-1)\n"
        "    torch.multiprocessing.spawn(main, ('file://' + sys.argv[1],), nprocs=2)\n"
    )
    to = tmp_path / "run"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "job.py"),
    ]
    spawning = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "rendezvous")]
    program = torchrun if launcher == "torchrun" else spawning
    command = [sys.executable, "-m", "repro", "record", "--to", str(to), "--", *program]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.PIPE, text=True) as recording:
        deadline = time.monotonic() + 60
        while not all(issues_collectives(to, rank) for rank in (0, 1)) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(recording.pid, signal.SIGINT)  # as a terminal does
        _, printed = recording.communicate(timeout=60)
    document = verdict_of(to)
    assert (recording.returncode, document["verdict"], document["culprits"]) == (130, "inconclusive", []), printed
    assert "the program still runs" not in printed, printed


def issues_collectives(to: Path, rank: int) -> bool:
    witnesses = read_dir(to / "events")[0] if (to / "events").is_dir() else {}
    return rank in witnesses and witnesses[rank].num_events > 20


PARALLEL = {
    "ddp": ("skipped", "ddp_average_gradients in group world.ddp of DistributedDataParallel"),
    "fsdp": ("extra", "all_gather_into_tensor #49 in group world of 0"),
    "pipeline": ("skipped", "recv in group world:2>3 of pipeline stage 3"),
    "async_tensor_parallel": ("skipped", "all_gather_into_tensor in group world of up"),
    "functional": ("skipped", "all_reduce in group tp"),
    "mesh": ("skipped", "all_reduce in group mesh_dp[3,7]"),
}
"""Kind of parallelism -> the cause, and the place where rank 3 left the rhythm of its steps."""


def record_eight(to: Path, kind: str, *flags: str) -> tuple[int, str]:
    """Record a job of eight forked ranks."""
    program = [sys.executable, str(JOBS.with_name("parallel_jobs.py")), kind, *flags]
    command = [sys.executable, "-m", "repro", "record", "--to", str(to), "--end", "--modules", "--quiet-window", "10"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, "--", *program], env=env, capture_output=True, text=True, timeout=290)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", PARALLEL)
def test_the_rank_that_left_its_rhythm_is_named_among_eight_with_group_and_module(tmp_path, kind):
    _, printed = record_eight(tmp_path / "run", kind, "--fault")
    document = verdict_of(tmp_path / "run")
    cause, place = PARALLEL[kind]
    found = (document["verdict"], document["cause"], document["culprits"], document["confidence"])
    assert found == ("deadlock", cause, [3], "likely"), printed
    assert place in printed, printed


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", PARALLEL)
def test_eight_ranks_without_a_fault_are_clean(tmp_path, kind):
    code, printed = record_eight(tmp_path / "run", kind)
    assert (code, verdict_of(tmp_path / "run")["verdict"]) == (0, "clean"), printed


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "pipeline", "tensor_parallel", "mesh", "compiled"])
def test_a_healthy_job_of_each_kind_is_clean_and_every_collective_has_ended(tmp_path, kind):
    code, printed = record(tmp_path / "run", kind, ranks=4)
    assert (code, verdict_of(tmp_path / "run")["verdict"]) == (0, "clean"), printed
    witnesses, refused = read_dir(tmp_path / "run" / "events")
    assert (sorted(witnesses), tuple(refused)) == ([0, 1, 2, 3], ())
    for witness in witnesses.values():
        kinds = [event.kind for event in witness.events()]
        issued = sum(kind in (Kind.ENTER, Kind.ISSUE) for kind in kinds)
        assert issued == sum(kind == Kind.LEAVE for kind in kinds) > 8, printed


@pytest.mark.full
@pytest.mark.timeout(240)
def test_a_bundle_of_a_recorded_job_gives_the_same_culprit_as_the_watch(tmp_path):
    record(tmp_path / "run", "fsdp", "--fault", ranks=4, options=("--quiet-window", "3"))
    made = subprocess.run(
        [sys.executable, "-m", "repro", "bundle", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert "by the bundle's files" not in made.stdout, made.stdout
    for path in (tmp_path / "run", tmp_path / "run.zip"):
        again = subprocess.run(
            [sys.executable, "-m", "repro", "watch", "--json", str(path)], capture_output=True, text=True
        )
        document = json.loads(again.stdout)
        assert (document["verdict"], document["culprits"]) == ("deadlock", [1]), (path, again.stdout)


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["compiled", "compiled_ddp"])
def test_a_compiled_program_has_as_many_graphs_recorded_as_without(tmp_path, kind):
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(JOBS), kind]
    _, recorded = record(tmp_path / "run", kind, options=("--modules",))
    plainly = subprocess.run(program, env=env, capture_output=True, text=True).stdout
    counts = [set(re.findall(r"graphs (\d+)", text)) for text in (plainly, recorded)]
    assert counts[0] == counts[1] and len(counts[0]) == 1, (counts, plainly, recorded)
