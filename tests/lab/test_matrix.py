"""The report's own configurations, and the matrix of layouts, kernel backends and caches."""

from __future__ import annotations

import dataclasses
import json

import pytest
from forked import run_forked

from repro.commands.cli import main
from repro.exit_codes import CANNOT_TELL, USAGE
from repro.lab import scenarios
from repro.lab.outcome.expectation import document_of
from repro.lab.search import matrix
from repro.lab.start import launch
from repro.lab.start.kernel_cache import CannotFill
from repro.lab.start.prepare import prepare_run_dir
from repro.verdict import Verdict

pytestmark = pytest.mark.timeout(300)  # one run compiles, on machines that may have other things to do


def test_the_three_configurations_serve_the_same_requests_and_have_one_reference():
    runs = [scenarios.settings_of({"scenario": name}) for name in ("config1", "config2", "tp8")]
    assert len({run.reference_key() for run in runs}) == 1
    served = [sorted({request.request_id for requests in run.requests() for request in requests}) for run in runs]
    assert served[0] == served[1] == served[2] and len(served[0]) > 8
    assert [(run.tp_size, run.expert_parallel, run.engine.mode) for run in runs] == [
        (1, True, "graphs"), (1, True, "eager"), (8, False, "graphs")
    ]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", ["tp8", "config1"])
def test_tensor_and_expert_parallel_servers_give_the_tokens_of_one_process(cold_run, tmp_path, name):
    document = {"model": {"layer_pattern": "GMAG", "linear_num_value_heads": 8}}
    settings = scenarios.settings_of({"scenario": name, "variant": "control"}, document)
    _, verdict = run_forked(settings, tmp_path)
    assert verdict["verdict"] == "clean" and verdict["matches_expected"], verdict


def test_the_matrix_expects_a_stall_of_every_cold_build_and_of_nothing_else():
    found = {}
    for cell in matrix.cells():
        settings = cell.settings({}, {})
        found[cell] = scenarios.load(settings.scenario).expected(settings).verdict
    assert len(found) == 18
    for cell, verdict in found.items():
        builds = "jit" in (cell.gdn, cell.moe) and cell.cache != "warm"
        assert verdict == ("crash" if cell.group_timeout_s else "slow" if builds else "clean"), cell
    layouts = {layout: [v for cell, v in found.items() if cell.layout == layout and cell.cache != "split"]
               for layout in ("TP8", "DP8+EP8")}  # fmt: skip
    assert layouts["TP8"] == layouts["DP8+EP8"], "the stall follows the cold build, not the layout"


@pytest.mark.full
@pytest.mark.parametrize("cell", [c for c in matrix.cells() if c.cache == "split" or (c.gdn, c.moe) == ("jit", "jit")])
def test_a_cell_of_the_matrix_ends_as_it_expects(cold_run, tmp_path, cell):
    document = {"model": {"layer_pattern": "GMAG", "linear_num_value_heads": 8}}
    run_dir, verdict = run_forked(cell.settings(document, {}), tmp_path)
    assert verdict["matches_expected"], verdict
    for rank in range(8):
        phases = matrix.phases(run_dir, rank)
        assert {"load", "prepare", "profile"} <= phases.keys() and min(phases.values()) >= 0, phases


@pytest.mark.parametrize("argv", [["run", "cold_jit", "--variant", "all"], ["matrix", "--only", "TP8 jit cold"]])
def test_a_run_whose_cache_cannot_be_filled_costs_no_other_run_its_verdict(tmp_path, monkeypatch, capsys, argv):
    """The first one gets its verdict, and the others name what this machine lacks."""

    def run(settings, out, *others):
        if done:
            raise CannotFill("cannot fill the kernel cache: the disk is full")
        done.append(settings)
        run_dir = prepare_run_dir(out, dataclasses.replace(settings, kernel_cache="cold"))
        return run_dir, document_of(settings, Verdict("clean"), matches_expected=True)

    done = []
    monkeypatch.setattr(launch, "run", run)
    assert main([*argv, "--out", str(tmp_path), "--json"]) == CANNOT_TELL
    output = capsys.readouterr()
    verdicts = [document["verdict"] for document in json.loads(output.out)]
    assert verdicts[0] == "clean" and set(verdicts[1:]) == {"inconclusive"} and len(verdicts) > 1
    assert "the disk is full" in output.err


def test_a_cell_that_does_not_exist_is_one_line(capsys):
    assert main(["matrix", "--only", "TP9"]) == USAGE
    assert "--only: no cell has all the words of 'TP9'" in capsys.readouterr().err
