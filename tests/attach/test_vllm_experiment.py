"""The experiment of `hmr cells` as it runs: servers of a stand-in of vLLM start, stall and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repro.attach.vllm.cells import experiment, server, table
from repro.attach.vllm.cells.machine import Machine
from repro.attach.vllm.cells.outcome import Outcome
from repro.commands.cli import main

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
STANDIN = ROOT / "tests" / "support" / "jobs" / "standin_server.py"
LAPTOP = Machine(vllm="0.32.0", recorder=True, py_spy=True)


def left(folder: Path) -> list[str]:
    """The command lines of processes whose environment names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(folder).encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


# -- the end of a server ---------------------------------------------------------------------------------------------

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleeper)
subprocess.Popen([sys.executable, "-S", "-c", f"import subprocess; subprocess.Popen({sleeper!r})"]).wait()
print("started", flush=True)
time.sleep(600)
"""


def test_a_server_that_ignores_sigterm_ends_with_all_that_it_started(tmp_path, monkeypatch):
    """Also a process whose parent has ended, which is in the server's process group but not below the server."""
    monkeypatch.setattr(server, "END_PATIENCE_S", 0.3)
    log = tmp_path / "log"
    environment = {**os.environ, "MARK": str(tmp_path)}
    started = server.Server([sys.executable, "-S", "-c", STUBBORN], environment, server.free_port(), log)
    until = time.monotonic() + 60
    while "started" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.02)
    assert len(left(tmp_path)) == 3 and not started.ready()
    assert started.end() == [] and started.exit_code() == -9
    until = time.monotonic() + 60
    while left(tmp_path) and time.monotonic() < until:
        time.sleep(0.02)
    assert left(tmp_path) == []


# -- experiments with the stand-in -----------------------------------------------------------------------------------


@pytest.fixture
def run_cells(tmp_path, monkeypatch):
    """A function that runs the TP cells of two ranks, and returns the exit code and the outcomes by name."""
    monkeypatch.setenv("STANDIN_BUILD_UNTIL", str(tmp_path / "cells" / "cells" / "*" / "looks" / "*" / "verdict.json"))
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: LAPTOP))
    monkeypatch.chdir(ROOT)
    to = tmp_path / "cells"

    def run(kind: str, *flags: str, only: str = "TP2 cpu cold") -> tuple[int, dict[str, dict]]:
        vllm = f"{sys.executable} {STANDIN} serve"
        code = main(["cells", "--vllm", vllm, "--model", kind, "--ranks", "2", "--to", str(to), "--only", only,
                     "--silence", "3", "--limit", "100", "--needs", "0.001", *flags])  # fmt: skip
        results = json.loads((to / "results.json").read_text())
        return code, {each["name"]: each for each in results}

    yield run, to
    assert not left(tmp_path), "processes are left"


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_cold_start_is_slow_with_the_builder_and_its_warm_twin_finds_what_was_built(run_cells):
    run, to = run_cells
    code, found = run("builds", only="TP2 cpu")
    cold, warm = found["tp2-cpu-cpu-cold"], found["tp2-cpu-cpu-warm"]
    assert (cold["state"], cold["verdict"], len(cold["culprits"])) == ("ready", "slow", 1), cold
    assert f"rank {cold['culprits'][0]} " in cold["where"].lower()
    assert (warm["state"], warm["culprits"], warm["partial"]) == ("ready", [], False), warm
    logs = [(to / "cells" / each["name"] / "record" / "logs" / "launcher.log").read_text() for each in (cold, warm)]
    assert ["builds" in log for log in logs] == [True, False]
    assert code == 1 and (to / "table.txt").is_file()
    markdown = (to / "table.md").read_text().splitlines()
    assert len(markdown[2].split(" | ")) == len(table.COLUMNS) and "| slow" in markdown[2]
    assert not list((to / "caches").iterdir()), "the caches of a finished pair are removed"
    assert {"tp2-cpu-cpu-cold.zip", "tp2-cpu-cpu-cold-collect.zip"} <= {p.name for p in (to / "bundles").iterdir()}


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_lock_that_is_held_across_a_collective_is_a_deadlock_with_its_holder(run_cells):
    run, to = run_cells
    code, found = run("locks")
    (cold,) = found.values()
    assert (cold["state"], cold["verdict"], cold["cause"], cold["culprits"]) == ("hung", "deadlock", "lock", [0]), cold
    assert code == 1 and cold["looked"]
    assert {p.name for p in (to / "bundles").iterdir()} == {f"{cold['name']}.zip", f"{cold['name']}-collect.zip"}


def test_a_server_that_ends_by_itself_is_a_crash_with_its_last_error(run_cells):
    run, _ = run_cells
    code, found = run("refuses", only="TP2 cpu")
    cold, warm = found.values()
    assert (code, cold["state"], cold["verdict"], cold["cause"]) == (1, "ended", "crash", "start"), cold
    assert "exit code 3" in cold["where"] and "the flags do not fit together" in cold["where"]
    assert warm["partial"]


def test_an_experiment_goes_on_where_it_stopped_and_starts_no_cell_twice(run_cells, capsys):
    run, to = run_cells
    run("refuses")
    before = (to / "cells" / "tp2-cpu-cpu-cold" / "outcome.json").stat().st_mtime_ns
    _, found = run("refuses", only="TP2 cpu")
    assert set(found) == {"tp2-cpu-cpu-cold", "tp2-cpu-cpu-warm"}
    assert (to / "cells" / "tp2-cpu-cpu-cold" / "outcome.json").stat().st_mtime_ns == before
    assert "1 cells of" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):  # another model in the same folder is refused before anything is written
        (to / "results.json").unlink()
        run("locks")
    assert "another model" in capsys.readouterr().err


def test_a_start_without_room_on_the_disk_is_not_made_and_comes_later(run_cells, capsys):
    run, to = run_cells
    code, found = run("refuses", "--needs", "900000", only="TP2 cpu")
    assert code == 125 and {each["state"] for each in found.values()} == {"not run"}
    assert "see --needs" in capsys.readouterr().out and not (to / "cells").exists()
    _, found = run("refuses")
    assert found["tp2-cpu-cpu-cold"]["state"] == "ended"


def test_a_disk_that_fills_during_a_start_ends_that_start_and_not_the_experiment(run_cells, monkeypatch):
    def full(self: Outcome, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    run, _ = run_cells
    monkeypatch.setattr(Outcome, "save", full)
    code, found = run("refuses", only="TP2 cpu")
    assert code == 1 and [each["state"] for each in found.values()] == ["ended", "ended"]
    assert all("No space left" in each["notes"][-1] for each in found.values())


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--only", "TP9"], 2, "--only: no cell has all the words of 'TP9'"),
        (["--silence", "0"], 2, "--silence: 0.0 is not a number"),
        (["--ranks", "0"], 2, "--ranks: 0 is not a number of ranks"),
        (["--vllm", ""], 2, "--vllm: no command is given"),
        (["--vllm", "'"], 2, "--vllm: "),
        (["--list"], 0, "dp8ep8-jit-jit-cold: its backends need an NVIDIA GPU"),
        (["--to", "pyproject.toml"], 2, "cannot write to pyproject.toml"),
        (["--to", "docs"], 2, "the folder has other files, but no experiment.json"),
        (["--only", "jit cold TP8"], 125, "not run (3): its backends need an NVIDIA GPU"),
    ],
)
def test_what_is_refused_is_one_line_with_the_flag(tmp_path, monkeypatch, capsys, flags, code, words):
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: LAPTOP))
    monkeypatch.chdir(ROOT)
    assert main(["cells", "--to", str(tmp_path / "cells"), *flags]) == code
    printed = capsys.readouterr()
    assert words in printed.out + printed.err


@pytest.mark.parametrize(("machine", "words"), [(Machine(), "has no vLLM"), (Machine(vllm="0.32.0"), "the recorder")])
def test_without_vllm_or_its_recorder_nothing_starts(monkeypatch, capsys, machine, words):
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: machine))
    assert main(["cells"]) == 2 and words in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_ctrl_c_ends_the_server_and_leaves_a_table_and_the_cell_for_later(run_cells):
    _, to = run_cells
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, 'tests/attach'); "
               "import test_vllm_experiment as t; from repro.commands.cli import main; "
               "t.Machine.here = classmethod(lambda cls: t.LAPTOP); sys.exit(main(sys.argv[1:]))"]  # fmt: skip
    words = ["cells", "--vllm", f"{sys.executable} {STANDIN} serve", "--model", "moves", "--ranks", "2",
             "--to", str(to), "--only", "TP2 cpu", "--needs", "0.001"]  # fmt: skip
    started = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    until = time.monotonic() + 60
    while not list(to.glob("cells/*/record/run.json")) and started.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    started.send_signal(2)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "go on with: --to" in out and "interrupted" in (to / "table.txt").read_text()
    assert not Outcome.load(to / "cells" / "tp2-cpu-cpu-cold").finished
    experiment._set_aside(to / "cells" / "tp2-cpu-cpu-cold")
    assert (to / "cells" / "tp2-cpu-cpu-cold.1" / "record" / "run.json").is_file()
