"""The texts of a bundle: ISSUE.md, to paste into an issue, and COMMANDS.sh, to run."""

from __future__ import annotations

from repro.bundle.replay import is_that_of_ep_deadlock
from repro.report.commands import commands
from repro.report.gather import RunData, headline
from repro.store.run_dir import read_text
from repro.store.text import escape_control_characters, short_site, shorten_rank_lists
from repro.verdict.result import list_ranks, name_ranks

ATTACHED = ("verdict.json", "events/", "fr/", "stacks/", "logs/", "control/", "fix/")
MAX_ISSUE_LINES = 60
MAX_PLACES, MAX_VERSIONS = 9, 10
UNPACKED = "bundle"
"""The folder in which the commands expect the unpacked bundle."""


def _one_file(data: RunData) -> str:
    most = 8 if is_that_of_ep_deadlock(data.verdict) else data.num_ranks
    return f"torchrun --standalone --nproc-per-node {min(data.num_ranks, most)} {UNPACKED}/repro.py"


def commands_script(data: RunData) -> str:
    """Return the script COMMANDS.sh: commands that repeat the run or judge it again, each with its purpose.

    If a command fails, the script goes on with the next command.
    """
    *again, (_, judge) = commands(data)
    found = [("judge the evidence in this bundle again", judge), *again]
    if (data.root / "repro.py").exists():
        found.append(("the same hang in one file", _one_file(data)))
    lines = [
        "#!/bin/sh",
        f"# Run in a clone of the repository after `make setup`, with this bundle unpacked in the folder `{UNPACKED}`.",
        "# Exit code 0: as expected. torchrun exits with 1 if the ranks hung and were ended.",
        "PATH=$PWD/.venv/bin:$PATH",
        """again() { printf '\\n+ %s\\n' "$*"; "$@"; printf 'exit code %s\\n' "$?"; }""",
    ]
    for purpose, command in found:
        lines += ["", f"# {' '.join(escape_control_characters(purpose).split())}", f"again {command}"]
    return "\n".join(lines) + "\n"


def issue(data: RunData, others: list[RunData], left_out: int = 0) -> str:
    """Return ISSUE.md: what a maintainer needs to see first, in at most MAX_ISSUE_LINES lines.

    data: the run that the issue is about
    others: the runs of its other variants
    left_out: how many strings, lines and fields of the run are left out of the bundle or replaced
    """
    verdict = data.verdict
    again = commands(data)[:-1]
    source = read_text(data.root / "repro.py")
    cure = "; --fix shows the cure" if '"--fix"' in source else ""
    one_file = [f"{_one_file(data)}    # the same hang in one file{cure}"] if source else []
    attached = ["report.html (timeline, schedules, stacks)", *(it for it in ATTACHED if (data.root / it).exists())]
    lines = [
        "# "
        + _line(f"{verdict.verdict or 'no verdict'} in {verdict.scenario}")
        + (f": {_line(verdict.cause)}" if verdict.cause else ""),
        "",
        f"**Claim.** {_line(headline(verdict))} {_mechanism(data)}",
        "",
        f"**Command**, in a clone of the repository after `make setup`, with the attached zip unpacked in `{UNPACKED}`",
        "```",
        _fenced(again[0][1] if again else "(not known: run.json is missing or names no command)"),
        *one_file,
        "```",
        "",
        *_issue_table(data),
        "",
        "**Which ranks wait for which**",
        *[f"- {_line(wait.words())}" for wait in verdict.waits[:6] if wait.awaited],
        *[f"- {_line(text)}" for text in verdict.evidence if "schedule" in text][:3],
        "",
        "**Variants `control` and `fix`**, run with the same requests and seed",
        "",
        "| variant | verdict | evidence |",
        "|---|---|---|",
        *[
            "| " + " | ".join(map(_line, (run.verdict.variant, run.verdict.verdict, run.verdict.evidence[-1]))) + " |"
            for run in others
            if run.verdict.evidence
        ],
        *([] if others else ["| - | - | not run |"]),
        "",
        "**What is not shown.** The hang of a real server can have a different cause: this run rebuilds one mechanism "
        f"on a small model, {_line(verdict.backend)} backend. No speed was measured.",
        "",
        "**Versions**, as loaded by the ranks",
        "```",
        *_versions(data),
        "```",
        "",
        f"Attached: {', '.join(attached)}. `python -m repro bundle --verify ZIP` checks this zip. {left_out} names, "
        "lines and fields that are not known to be harmless are left out or replaced (MANIFEST.json counts them by "
        "kind); `python -m repro bundle RUN --with-logs` adds those lines in which a search finds nothing suspicious.",
    ]
    return "\n".join(lines[:MAX_ISSUE_LINES]) + "\n"


def _issue_table(data: RunData) -> list[str]:
    rows: dict[tuple[str, ...], list[int]] = {}
    for p in data.verdict.ranks:
        call = f"{p.group} {p.op} #{p.seq}" if p.op else p.detail
        step = str(p.step) if p.step >= 0 else p.phase
        rows.setdefault((p.state, step, call, p.layer, short_site(p.site)), []).append(p.rank)
    table = ["| ranks | state | step | in | layer | called from |", "|---|---|---|---|---|---|"]
    for cells, ranks in list(rows.items())[:MAX_PLACES]:
        table.append(f"| {shorten_rank_lists(list_ranks(ranks))} | " + " | ".join(_line(cell) for cell in cells) + " |")
    if len(rows) > MAX_PLACES:
        table.append(f"| {len(rows) - MAX_PLACES} more places | | | | | |")
    culprits = data.verdict.culprits
    named = (
        f"Culprits: {shorten_rank_lists(name_ranks(culprits))}." if culprits else "No rank is proven to be the culprit."
    )
    return [*table, "", f"{named} Confidence: {data.verdict.confidence or 'unknown'}."]


def _versions(data: RunData) -> list[str]:
    """Return the software versions that the ranks loaded, in at most MAX_VERSIONS lines.

    Ranks with the same versions are listed together.
    """
    together: dict[str, list[int]] = {}
    for rank in range(data.num_ranks):
        text = read_text(data.run_dir.environment(rank))
        together.setdefault(text.strip() or "(not recorded)", []).append(rank)
    lines: list[str] = []
    room = MAX_VERSIONS // max(1, min(len(together), 3)) - 1
    for text, ranks in list(together.items())[:3]:
        found = [_fenced(line) for line in text.splitlines() if line.strip()]
        more = f" ({len(found) - room} more lines in env/)" if len(found) > room else ""
        lines += [f"{shorten_rank_lists(name_ranks(ranks))}:{more}", *found[:room]]
    if len(together) > 3:
        lines[-1] = f"and {len(together) - 3} more groups of ranks with equal versions, see env/"
    return lines or ["(not recorded)"]


def _mechanism(data: RunData) -> str:
    described = data.description
    if described is None or not described.mechanism:
        return ""
    mirrors = f" (mirrors {described.source})" if described.source else ""
    return f"Mechanism: {_line(described.mechanism + mirrors)}."


def _line(text: str) -> str:
    """Return an untrusted text as one line of Markdown, escaped so that none of it acts as markup."""
    plain = escape_control_characters(shorten_rank_lists(text), 300).replace("\n", " ").replace("|", "\\|")
    return plain.replace("<", "&lt;").replace("`", "'").replace("[", "\\[")


def _fenced(text: str) -> str:
    """Return an untrusted text as one line of a fenced code block. The text cannot end the code block.

    Only line breaks, control characters and "```" are replaced, so that a user can copy the line. A text of more than
    4000 characters is cut.
    """
    return escape_control_characters(text, 4000).replace("\n", " ").replace("```", "'''")
