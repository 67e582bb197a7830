"""Print the output of commands: a live table of the ranks on a terminal, plain lines elsewhere, and the final table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from repro.report.live_table import LiveTable
from repro.report.tables import cell, lines, make_table, narrowest
from repro.store.text import escape_lines, shorten_rank_lists
from repro.trace.identity import myself
from repro.trace.witness.file import Tail
from repro.verdict.classes import class_of
from repro.verdict.result import list_ranks, shorten
from repro.watch.document import Document


@dataclass
class Display:
    """How a run shows its progress.

    show     called whenever the watcher has read the witnesses, with the reader of each rank's witness
    notice   called with a line of text to print
    """

    show: Callable[[list[Tail]], None] = lambda tails: None
    notice: Callable[[str], None] = lambda text: None


@contextlib.contextmanager
def display(console: Console, title: str) -> Iterator[Display]:
    """Show a live table with this title if the console is a terminal; else print the title, then each notice."""
    if not console.is_terminal:
        say(console, title)
        yield Display(notice=lambda text: say(console, f"  {text}"))
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        table = LiveTable(title, live, myself(0, 1))
        yield Display(show=table.show, notice=lambda text: say(console, text))


def say(console: Console, text: str) -> None:
    """Print plain lines, without markup and without terminal escapes."""
    console.print(escape_lines(text), highlight=False, markup=False, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Print a table. Without a terminal, or if it is so narrow that words would break, print each row as one line."""
    if console.is_terminal and narrowest(console, table) <= console.width:
        console.print(table)
    else:
        say(console, "\n".join(lines(table)))


def summary(console: Console, documents: Sequence[Document]) -> None:
    """Print a row for each variant of a scenario, then sentences: where ranks are, and which ranks wait for which.

    documents   the verdict.json of each run
    """
    say(console, f"{documents[0].scenario}, {documents[0].num_ranks} ranks")
    table = make_table("variant", *_COLUMNS, right=_NUMBERS)
    for document in documents:
        table.add_row(cell(document.variant), *_cells(document))
    print_table(console, table)
    for document in documents:
        for sentence in _sentences(document):
            say(console, f"{document.variant}: {sentence}")


def overview(console: Console, documents: Sequence[Document]) -> None:
    """Print a row for each run of several scenarios, then sentences about the runs with an unexpected verdict.

    documents   the verdict.json of each run
    """
    num_scenarios = len({document.scenario for document in documents})
    say(console, f"{num_scenarios} scenarios, {documents[0].num_ranks} ranks, seed {documents[0].seed}")
    table = make_table("scenario", "variant", *_COLUMNS, right=_NUMBERS)
    previous = ""
    for document in documents:
        scenario = "" if document.scenario == previous else document.scenario
        table.add_row(cell(scenario), cell(document.variant), *_cells(document))
        previous = document.scenario
    print_table(console, table)
    missed = [document for document in documents if not document.matches_expected]
    for document in missed:
        for sentence in _sentences(document) or document.evidence:
            say(console, f"{document.scenario} {document.variant}: {sentence}")
    total_s = sum(document.seconds.total for document in documents)
    say(console, f"{len(documents) - len(missed)} of {len(documents)} as expected, {total_s:.0f} s")


_COLUMNS = ("verdict", "culprits", "seconds", "stalled", "as expected")
_NUMBERS = ("seconds", "stalled")


def _cells(document: Document) -> tuple[Text, ...]:
    """Return a row of the table. The column "stalled" is the time from the last event of any rank to the verdict."""
    outcome = ", ".join(filter(None, (document.verdict, document.cause)))
    stalled = f"{document.seconds.stall_to_verdict:.2f} s" if _stalled(document) else "-"
    return (
        cell(outcome, class_of(document.verdict).colour),
        cell(_culprits(document)),
        cell(f"{document.seconds.total:.1f}"),
        cell(stalled),
        _remark(document),
    )


def _culprits(document: Document) -> str:
    """Format the culprits. If there are none, format the suspects with a question mark, because nothing is proven."""
    culprits, suspects = (shorten_rank_lists(list_ranks(ranks)) for ranks in (document.culprits, document.suspects))
    return culprits or (f"{suspects}?" if suspects else "-")


def _remark(document: Document) -> Text:
    if document.matches_expected:
        return cell("yes")
    return cell("not run", "yellow") if document.skipped else cell("NO", "red")


def _stalled(document: Document) -> bool:
    return bool(class_of(document.verdict).hangs) and not document.skipped


def _sentences(document: Document) -> list[str]:
    if document.verdict == "clean":
        return list(document.evidence[-1:])
    return [*document.sentences, *waits(document), *([] if document.matches_expected else document.evidence)]


def outcome(document: Document) -> str:
    """Return the verdict with its cause and culprits: "deadlock (mismatch), culprits: 1"."""
    cause = f" ({document.cause})" if document.cause else ""
    culprits = f", culprits: {list_ranks(document.culprits)}" if document.culprits else ""
    return f"{document.verdict}{cause}{culprits}"


def waits(document: Document) -> list[str]:
    """Return a sentence for each collective or lock in which ranks wait for other ranks."""
    return shorten([shorten_rank_lists(wait.words()) for wait in document.waits if wait.awaited])
