"""Handle the verdicts of a command's runs: compute the exit code, write the reports, print the verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from repro.commands.shared.errors import describe_failure, say_error
from repro.exit_codes import EXPECTED
from repro.report import write_all
from repro.report.terminal import overview, say, summary
from repro.store.schema import to_json
from repro.verdict.classes import class_of
from repro.watch.document import Document


def exit_code(documents: Sequence[Document]) -> int:
    """Return the exit code for all verdicts together: EXPECTED if every verdict is as expected.

    Otherwise it is CANNOT_TELL if all unexpected verdicts are `inconclusive`, else UNEXPECTED.

    documents: the content of verdict.json of each run
    """
    missed = {class_of(document.verdict).exit_code for document in documents if not document.matches_expected}
    # the exit code of an unexpected verdict is lower than that of an inconclusive one
    return min(missed, default=EXPECTED)


def write_reports(console: Console, roots: Sequence[Path]) -> None:
    """Write the report of each run. A report also shows the other variants of the run's scenario.

    If a report cannot be written, print the error. The verdicts do not change.

    roots: the run directories
    """
    try:
        write_all(roots)
    except (OSError, ValueError) as error:
        say(console, f"  no report: {error}")
    except Exception as error:
        say_error(error, f"no report: {describe_failure(error)}")


def print_verdicts(console: Console, documents: Sequence[Document], as_json: bool) -> None:
    """Print the verdicts as JSON (``as_json``), or as a table with sentences below the table.

    documents: the content of verdict.json of each run
    """
    if as_json:
        print(json.dumps(to_json(documents), indent=1))
    elif documents:
        show = overview if len({document.scenario for document in documents}) > 1 else summary
        show(console, documents)
