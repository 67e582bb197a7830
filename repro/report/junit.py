"""Write verdicts as JUnit XML for build servers: one suite per scenario, one test case per variant."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from repro.store.run_dir import OutputError, write_atomically
from repro.store.schema import to_json
from repro.verdict.classes import class_of
from repro.verdict.result import list_ranks
from repro.watch.document import Document


def write_junit(path: Path, documents: Sequence[Document]) -> None:
    """Write the verdicts to a file. Raises OutputError if the file cannot be written.

    An unexpected verdict is a failure, or an error if it is `inconclusive` or missing. A run that did not take place
    (its ``skipped`` gives the reason) is a skipped test.

    documents: the content of each run's verdict.json, sorted by scenario
    """
    root = ET.Element("testsuites", name="repro")
    for scenario, group in groupby(documents, key=lambda document: document.scenario):
        cases = list(group)
        suite = ET.SubElement(root, "testsuite", name=scenario, tests=str(len(cases)))
        kinds = [_add_case(suite, document) for document in cases]
        for kind, count in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            suite.set(kind, str(kinds.count(count)))
        suite.set("time", f"{sum(document.seconds.total for document in cases):.3f}")
    ET.indent(root)
    try:
        write_atomically(path, ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}; choose another file with --junit") from error


def _add_case(suite: ET.Element, document: Document) -> str:
    case = ET.SubElement(
        suite,
        "testcase",
        classname=f"repro.{document.scenario}",
        name=f"{document.variant} seed {document.seed}",
        time=f"{document.seconds.total:.3f}",
    )
    if document.skipped:
        ET.SubElement(case, "skipped", message=_printable(document.skipped))
        return "skipped"
    ET.SubElement(case, "system-out").text = _printable("\n".join([*document.sentences, *document.evidence]))
    if document.matches_expected:
        return ""
    kind = class_of(document.verdict).junit
    culprits = list_ranks(document.culprits) or "none"
    message = (
        f"{document.verdict}, cause {document.cause or 'none'}, culprits {culprits}; "
        f"expected {to_json(document.expected)}"
    )
    ET.SubElement(case, kind, message=_printable(message))
    return kind


def _printable(text: str) -> str:
    """Replace control characters, which a rank's error can contain and XML does not allow."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)
