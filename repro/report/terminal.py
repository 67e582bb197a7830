"""What a person sees: a live table of the ranks on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from repro.store.text import escape_control_characters, escape_lines, shorten_rank_lists
from repro.trace.format import Kind
from repro.trace.parse import WitnessError
from repro.trace.witness import Tail
from repro.verdict.result import list_ranks, shorten
from repro.watch.document import Document

REFRESH_S = 0.5

_STYLES = {
    "clean": "green",
    "slow": "green",
    "deadlock": "red",
    "corrupt": "red",
    "crash": "red",
    "inconclusive": "yellow",
}


class LiveTable:
    """Redraws the ranks' positions twice a second; reads whole witnesses, so only for eyes, not for decisions."""

    def __init__(self, title: str, live: Live) -> None:
        self._title = title
        self._live = live
        self._drawn_s = 0.0

    def show(self, tails: list[Tail]) -> None:
        """Called at every poll of the watcher."""
        if time.monotonic() - self._drawn_s > REFRESH_S:
            self._drawn_s = time.monotonic()
            self._live.update(self._draw(tails), refresh=True)

    def notice(self, text: str) -> None:
        """A line above the table."""
        say(self._live.console, text)

    def _draw(self, tails: list[Tail]) -> Table:
        table = Table(title=self._title, title_justify="left")
        for column in ("rank", "phase", "step", "where", "for"):
            table.add_column(column, justify="right" if column in ("rank", "step", "for") else "left")
        for rank, tail in enumerate(tails):
            table.add_row(str(rank), *(Text(escape_control_characters(cell, 120)) for cell in position(tail)))
        return table


@dataclass
class Display:
    """Where a run tells how it goes: ``show`` at every poll, ``notice`` for what is worth a line."""

    show: Callable[[list[Tail]], None] = lambda tails: None
    notice: Callable[[str], None] = lambda text: None


def position(tail: Tail) -> tuple[str, str, str, str]:
    """Where a rank stands, in words: its phase, step, place, and for how long."""
    try:
        witness = tail.witness()
    except (OSError, WitnessError):
        return "-", "-", "-", "-"
    if (last := witness.last) is None:
        return "starting", "-", "-", "-"
    match last.kind:
        case Kind.DONE:
            where = "done"
        case Kind.FAILED:
            where = "failed"
        case Kind.ENTER | Kind.WAIT:
            signature = witness.signature(last.sig)
            where = f"in {signature.group} {signature.op} #{last.seq} {signature.layer}"
        case Kind.LOCK_WAIT:
            where = f"waits for lock {witness.text(last.sig)}"
        case Kind.BUILD_BEGIN:
            where = f"builds {witness.text(last.sig)}"
        case _:
            where = "computing"
    step = str(last.step) if last.step >= 0 else "-"
    return witness.text(last.phase), step, where, f"{(time.monotonic_ns() - last.t_ns) / 1e9:.1f} s"


@contextlib.contextmanager
def display(console: Console, title: str) -> Iterator[Display]:
    """A live table when the console is a terminal, else a line at the start and one for each notice."""
    if not console.is_terminal:
        say(console, title)
        yield Display(notice=lambda text: say(console, f"  {text}"))
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        table = LiveTable(title, live)
        yield Display(show=table.show, notice=table.notice)


def say(console: Console, text: str) -> None:
    """Plain lines: nothing in them marks up, and nothing acts on the terminal."""
    console.print(escape_lines(text), highlight=False, markup=False, soft_wrap=True)


def summary(console: Console, documents: Sequence[Document]) -> None:
    """The table at the end: a row a variant, and below it where the ranks stand and whom they wait for."""
    table = Table(title=f"{documents[0].scenario}, {documents[0].num_ranks} ranks", title_justify="left")
    for column, justify in (
        ("variant", "left"), ("verdict", "left"), ("cause", "left"), ("culprits", "left"),
        ("seconds", "right"), ("stall to verdict", "right"), ("as expected", "left"),
    ):  # fmt: skip
        table.add_column(column, justify=justify, no_wrap=column == "verdict")  # type: ignore[arg-type]
    for document in documents:
        table.add_row(
            document.variant,
            f"[{_STYLES.get(document.verdict, 'yellow')}]{document.verdict}[/]",
            document.cause or "-",
            list_ranks(document.culprits) or "-",
            f"{document.seconds.total:.1f}",
            f"{document.seconds.stall_to_verdict:.2f} s" if _stalled(document) else "-",
            "yes" if document.matches_expected else "[red]no[/]",
        )
    console.print(table)
    for document in documents:
        for sentence in _sentences(document):
            say(console, f"{document.variant}: {sentence}")


def overview(console: Console, documents: Sequence[Document]) -> None:
    """The table of several scenarios, cut nowhere, and sentences for those alone that did not end as expected.

    Ranks with a question mark are suspects: they stand out, and nothing is proven.
    """
    rows = [("scenario", "variant", "verdict", "culprits", "seconds", "stalled", "as expected")]
    previous = ""
    for document in documents:
        remark = "not run" if document.skipped else "NO"
        suspects = list_ranks(document.suspects)
        rows.append((
            "" if document.scenario == previous else document.scenario,
            document.variant,
            ", ".join(filter(None, (document.verdict, document.cause))),
            list_ranks(document.culprits) or (f"{suspects}?" if suspects else "-"),
            f"{document.seconds.total:.1f}",
            f"{document.seconds.stall_to_verdict:.2f} s" if _stalled(document) else "-",
            "yes" if document.matches_expected else remark,
        ))  # fmt: skip
        previous = document.scenario
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = (rows[0].index("seconds"), rows[0].index("stalled"))
    found = {document.scenario for document in documents}
    lines = [f"{len(found)} scenarios, {documents[0].num_ranks} ranks, seed {documents[0].seed}"]
    for row in rows:
        cells = (
            cell.rjust(width) if index in numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    missed = [document for document in documents if not document.matches_expected]
    for document in missed:
        name = f"{document.scenario} {document.variant}"
        lines += [f"{name}: {sentence}" for sentence in _sentences(document) or document.evidence]
    total_s = sum(document.seconds.total for document in documents)
    lines.append(f"{len(documents) - len(missed)} of {len(documents)} as expected, {total_s:.0f} s")
    say(console, "\n".join(lines))


def _stalled(document: Document) -> bool:
    return document.verdict not in ("clean", "slow", "corrupt") and not document.skipped


def _sentences(document: Document) -> list[str]:
    if document.verdict == "clean":
        return list(document.evidence[-1:])
    return [*document.sentences, *waits(document), *([] if document.matches_expected else document.evidence)]


def waits(document: Document) -> list[str]:
    """A sentence for each place at which ranks wait for others, of a verdict."""
    return shorten([shorten_rank_lists(wait.words()) for wait in document.waits if wait.awaited])
