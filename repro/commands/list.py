"""``list``: print each scenario, the upstream issue that it rebuilds, and the expected verdict on its fault."""

from __future__ import annotations

import argparse
import json

from repro.exit_codes import EXPECTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the scenarios as a JSON list")


def run(args: argparse.Namespace) -> int:
    """Print a line, or with --json an object, for each scenario and each start command of vllm#41862; return 0."""
    from rich.console import Console

    from repro.lab import scenarios
    from repro.lab.configurations import CONFIGURATIONS
    from repro.report.tables import cell, make_table
    from repro.report.terminal import print_table

    rows = []
    for scenario in map(scenarios.load, [*scenarios.names(), *CONFIGURATIONS]):
        faulty = scenarios.settings_of({"scenario": scenario.name, "variant": "fault"})
        rows.append((scenario, scenario.expected(faulty)))
    if args.json:
        listed = [
            {
                "name": scenario.name, "summary": scenario.summary, "source": scenario.source,
                "expected": expected.to_json(),
            }
            for scenario, expected in rows
        ]  # fmt: skip
        print(json.dumps(listed, indent=1))
        return EXPECTED
    table = make_table("name", "verdict", "summary", header=False)
    for scenario, expected in rows:
        table.add_row(cell(scenario.name), cell(expected.words()), cell(f"{scenario.summary} ({scenario.source})"))
    print_table(Console(), table)
    return EXPECTED
