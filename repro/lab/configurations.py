"""The three start commands of the report vllm#41862, on the reference model: config1, config2 and tp8.

Each command is a scenario. The fault of these scenarios is what servers do by default: compile a kernel when a layer
first needs it. Expert parallelism is not the only difference between the commands:

    config1  DP8 EP8, graphs     GDN prefill and experts are compiled at first use
    config2  DP8 EP8, eager      GDN prefill and experts are compiled at first use
    tp8      TP8, graphs         nothing is compiled at first use: the report's command names a GDN backend that needs
             no such compilation (triton), and with TP8 vLLM selects a MoE backend that needs none either

All three serve the same requests, so all three must produce the same tokens.
"""

from __future__ import annotations

from typing import Any

from repro.lab.scenarios import Scenario, cold_jit

SOURCE = "vllm#41862"
MODEL = {"linear_num_value_heads": 8}
"""Changes to the tiny model: one GDN value head for each of eight tensor-parallel ranks."""

TP8 = {"tp_size": 8, "expert_parallel": False, "drawn_for": 8}


def _configuration(name: str, summary: str, mode: str, engine: dict[str, Any], layout: dict[str, Any]) -> Scenario:
    return Scenario(
        name=name,
        summary=summary,
        source=SOURCE,
        policies=cold_jit.policies,
        hang=cold_jit.hang,
        refused=cold_jit.hang,
        missing=cold_jit.missing,
        defaults={"model": MODEL, "engine": {"mode": mode, **engine}, **layout},
    )


CONFIGURATIONS = {
    scenario.name: scenario
    for scenario in (
        _configuration("config1", "the report's first command: DP8 EP8 with graphs", "graphs", cold_jit.JIT, {}),
        _configuration("config2", "the report's second command: DP8 EP8, eager", "eager", cold_jit.JIT, {}),
        _configuration("tp8", "the report's command that does not hang: TP8, GDN backend named", "graphs", {}, TP8),
    )
}
