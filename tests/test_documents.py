"""The documents lead somewhere: their links, the rooms that they name, and the environment variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings: lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_to_a_heading_that_is_there(path: Path) -> None:
    for link in LINK.findall(path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link} leads to nothing"
        assert not anchor or anchor in anchors(target.read_text()), f"{path.name}: {link} has no such heading"


def test_the_readme_leads_to_every_document() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text())}
    missing = [path.name for path in DOCUMENTS[1:] if f"docs/{path.name}" not in linked]
    assert not missing, f"the README does not link to {missing}"


def test_the_architecture_names_every_room() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "repro").glob("*/__init__.py")}
    missing = sorted(room for room in rooms if not re.search(rf"^  {room}/ ", text, re.MULTILINE))
    assert rooms and not missing, f"docs/ARCHITECTURE.md does not list {missing}"


NAME = re.compile(r"\bHMR_[A-Z_]+\b")


def test_every_environment_variable_is_documented_and_none_that_is_not_read() -> None:
    folders = ("hybrid_moe_ref", "kernels", "repro", "tests", "benchmarks", "scripts")
    files = [ROOT / "Makefile", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    read = {name: path for path in files for name in NAME.findall(path.read_text())}
    rows = (
        line for line in (ROOT / "docs" / "CONFIGURATION.md").read_text().splitlines() if line.startswith("| `HMR_")
    )
    table = {name for row in rows for name in NAME.findall(row)}
    missing = {name: str(path.relative_to(ROOT)) for name, path in read.items() if name not in table}
    assert not missing, f"not in docs/CONFIGURATION.md: {missing}"
    assert not table - read.keys(), f"in docs/CONFIGURATION.md alone: {sorted(table - read.keys())}"
