"""What could not be kept free of deadlock is refused at once, in one line that names the flag to change."""

from __future__ import annotations

import dataclasses
import re

import pytest

from hybrid_moe_ref.__main__ import main
from hybrid_moe_ref.config import ParallelConfig
from hybrid_moe_ref.engine.policies import IdlePolicy, Policies
from hybrid_moe_ref.engine.startup.refusal import Refused, check_start
from repro import exit_codes
from repro.commands import cli
from repro.lab import scenarios
from repro.lab.settings import RunSettings

DP8 = ParallelConfig(dp_size=8)


def server(checks, pattern="GGMA", parallel=DP8, **engine):
    settings = RunSettings.from_document(
        {"model": {"layer_pattern": pattern}, "engine": engine}, {"scenario": "any", "variant": "control"}, ""
    )
    return dataclasses.replace(settings.server(), checks=checks, parallel=parallel)


def test_expert_parallelism_over_hybrid_layers_without_agreement_is_refused_with_the_flag_to_change():
    with pytest.raises(Refused) as refused:
        check_start(server("observe"))
    assert str(refused.value) == (
        "expert parallelism is not supported for models with gated_delta_net and mamba2 hybrid layers while the ranks "
        "do not agree on their schedules: use --checks agree, or tensor parallelism instead (tp_size = 8) "
        "(to start nevertheless: --allow-unsafe)"
    )
    allowed = dataclasses.replace(server("observe", mode="graphs"), allow_unsafe=True)
    assert [finding.split(" is not")[0] for finding in check_start(allowed)] == ["expert parallelism", "graph mode"]


@pytest.mark.parametrize(
    "config",
    [
        server("agree"),
        server("strict", mode="graphs"),
        server("observe", pattern="AA"),
        server("observe", parallel=ParallelConfig(tp_size=8, expert_parallel=False)),
        server("observe", parallel=ParallelConfig(dp_size=8, expert_parallel=False)),
    ],
)
def test_what_can_be_kept_free_of_deadlock_is_not_refused(config):
    assert check_start(config) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "metadata_rebuild",
            r"at layers.0.gated_delta_net a rank with requests would issue 2 .*an idle rank 1",
        ),
        ("idle_skip", r"a rank without requests would leave.*policies.idle"),
        ("graph_mode", r"graph mode is not supported if each rank chooses its graph by itself.*engine.mode = eager"),
        ("autotune_cache", r"a rank with a saved tuning result would skip.*policies.tuning"),
        ("late_preemption", r"a rank whose cache is full would leave a step.*make room before.*policies.preemption"),
    ],
)
def test_a_policy_that_leads_ranks_apart_is_found_by_trying_it_even_where_they_agree(name, words):
    settings = scenarios.settings_of({"scenario": name, "variant": "fault", "checks": "agree"})
    scenario = scenarios.load(name)
    config = dataclasses.replace(scenario.server(settings, 0), allow_unsafe=False)
    with pytest.raises(Refused, match=words):
        check_start(config, scenario.policies(settings, 0))


@pytest.mark.parametrize("variant", ["control", "fix"])
@pytest.mark.parametrize("name", scenarios.names())
def test_no_cure_is_refused(name, variant):
    settings = scenarios.settings_of({"scenario": name, "variant": variant})
    scenario = scenarios.load(name)
    assert check_start(scenario.server(settings, 0), scenario.policies(settings, 0)) == [], f"{name} {variant}"


def test_a_policy_that_fails_in_its_trial_ends_the_start_with_its_own_error():
    class Broken(IdlePolicy):
        def dummy_tokens(self, unfinished):
            raise KeyError("no such setting")

    with pytest.raises(KeyError, match="no such setting"):
        check_start(server("agree"), Policies(idle=Broken()))


def test_a_run_that_is_not_to_hang_is_refused_without_agreement(tmp_path, capsys):
    arguments = ["run", "metadata_rebuild", "--variant", "fix", "--checks", "observe", "--out", str(tmp_path)]
    assert cli.main(arguments) == exit_codes.USAGE
    line = capsys.readouterr().err
    assert re.fullmatch(r"repro: expert parallelism is not supported for .*--checks agree.*--allow-unsafe.*\n", line), (
        line
    )
    assert not list(tmp_path.iterdir()), "it was refused before anything was made"


@pytest.mark.parametrize("extra", [[], pytest.param(["--allow-unsafe"], marks=pytest.mark.full)])
def test_generate_refuses_and_is_overridden_in_words(capfd, extra):
    arguments = ["generate", "tiny", "--tokens", "1,2", "--max-new-tokens", "2"]
    code = main([*arguments, "--layout", "dp8ep8", "--checks", "observe", "--mode", "graphs", *extra])
    out, err = capfd.readouterr()
    if extra:
        assert code == 0 and len(out.split()) == 2, err
        assert "--allow-unsafe: started although expert parallelism" in err
    else:
        assert code == 2 and out == "", err
        assert err.count("\n") == 1 and "expert parallelism is not supported" in err
