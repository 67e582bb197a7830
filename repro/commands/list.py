"""``list``: print the scenarios, what each mirrors, and the verdict on its fault."""

from __future__ import annotations

import argparse
import json

from repro.exit_codes import EXPECTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Print a line, or a JSON object, for each scenario and each configuration of the report."""
    from repro.lab import scenarios
    from repro.lab.configurations import CONFIGURATIONS

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
    name_width = max(len(scenario.name) for scenario, _ in rows)
    verdict_width = max(len(expected.words()) for _, expected in rows)
    for scenario, expected in rows:
        words = f"{expected.words():{verdict_width}}"
        print(f"{scenario.name:{name_width}}  {words}  {scenario.summary} ({scenario.source})")
    return EXPECTED
