"""Redact logs, stacks and machine descriptions line by line: rebuild each line from its recognised parts.

A line keeps its prefix (rank, level, time, the file that logged it) if the prefix has a known form, and its text if
every word is known. A frame keeps the path below its package, the line and the function. An exception keeps its type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from repro.bundle.redact.recognise import GONE, MAX_TEXT, Recogniser, is_error
from repro.bundle.redact.words import below_package, is_file, is_word, plain

_PREFIXES = tuple(
    re.compile(form)
    for form in (
        r"\[rank ?\d{1,6}\]:?",
        r"\[?(?:rank|Rank) \d{1,6}\]?:",
        r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?Z?",
        r"\d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d{1,6})?",
        r"(?:DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL)\b:?",
        r"\[[WEIF]\d{4} \d\d:\d\d:\d\d\.\d{1,9} (?P<file>[\w./-]+):\d{1,6}\]",
        r"[WEIF]\d{4} \d\d:\d\d:\d\d\.\d{1,9} \d{1,9} (?P<file>[\w./-]+):\d{1,6}\]",
        r"\[(?P<file>[\w./-]+):\d{1,6}\]",
        r"\[(?:default)?\d{1,5}\]:?",
        r"\((?P<name>[A-Z]\w{2,40}?)(?:_\w{1,8})? pid=\d{1,8}\)",
        r"(?P<host>[\w.-]{1,80}):\d{1,8}:\d{1,8} \[\d{1,3}\] NCCL (?:INFO|WARN)",
        r"(?P<file>[\w./+-]+):\d{1,6}: (?:[A-Z]\w+Warning):",
    )
)
_FRAME = re.compile(r'(?P<indent> *)File "(?P<path>[^"\n]+)", line (?P<line>\d{1,7})(?P<comma>,?) in (?P<function>\S+)')
_SOURCE = re.compile(r" {3,}\S|[ ^~]+$")
_THREAD = re.compile(
    r"(?P<current>Current thread|Thread) (?P<id>0x[0-9a-f]{1,16})(?: \[[^\]\n]*\])?"
    r"(?P<end> \(most recent call first\):)"
)
_EXCEPTION = re.compile(r"(?P<type>[A-Za-z_][\w.]{1,160})(?:: (?P<message>.*))?")


def log(text: str, recogniser: Recogniser) -> str:
    """Redact a log with ``recogniser``. Where lines are dropped, a line says how many lines were left out."""
    return _joined(_log_lines(text, recogniser))


def _log_lines(text: str, recogniser: Recogniser) -> Iterator[str | None]:
    after_frame, before, line = False, "", ""
    for row in text.splitlines():
        before, line = line, row[:MAX_TEXT].rstrip()
        frame = _frame(line, recogniser)
        if frame is None and after_frame and _SOURCE.match(line):
            continue  # the source code that follows a frame
        after_frame = frame is not None
        yield frame if frame is not None else _log_line(line, before, recogniser)


def _log_line(line: str, before: str, recogniser: Recogniser) -> str | None:
    """Keep the parts of a line that are known to be harmless. Returns None if there is no such part.

    before: the line above this line in the log. It can name a secret whose value is in this line
    """
    if not line.strip():
        return ""
    prefix, rest = _prefix(plain(line), recogniser)
    if not rest.strip():
        return prefix.rstrip()
    if (kept := recogniser.recognised(rest)) is not None:
        return prefix + kept
    exception = _EXCEPTION.fullmatch(rest)
    if exception is not None and is_error(exception["type"]):
        return f"{prefix}{exception['type']}: {recogniser.line(exception['message'] or '', before) or GONE}"
    if text := recogniser.line(rest, before):
        return prefix + text
    return f"{prefix}{GONE}" if prefix else None


def _prefix(line: str, recogniser: Recogniser) -> tuple[str, str]:
    """Redact the known prefixes of a line (time, writer). Returns (redacted prefixes, the text after the prefixes)."""
    prefix, rest = "", line
    while rest:
        match = next((found for form in _PREFIXES if (found := form.match(rest))), None)
        if match is None or match.end() == 0:
            break
        prefix += _rebuilt(match, recogniser)
        rest = rest[match.end() :]
        blanks = len(rest) - len(rest.lstrip(" "))
        prefix, rest = prefix + " " * min(blanks, 1), rest[blanks:]
    return prefix, rest


def _rebuilt(match: re.Match[str], recogniser: Recogniser) -> str:
    """Return a prefix of a log line, redacted if it contains a host, a path, or the name and pid of a process.

    A host becomes a stand-in. A path is cut to the part that begins at a known package; without such a part it
    becomes "file". A file name of known words is unchanged. The name and pid become "(pid)" if the name is not a known
    word. Any other prefix, such as a time, is unchanged.

    match: a match of one of _PREFIXES
    """
    text, names = match[0], match.groupdict()
    if (host := names.get("host")) is not None:
        return text.replace(host, recogniser.hosts.get(host, "host"), 1)
    if (file := names.get("file")) is not None:
        return text.replace(file, (below_package(file) or "file") if not is_file(file) else file, 1)
    if (name := names.get("name")) is not None and not is_word(name):
        return "(pid)"
    return text


def _frame(line: str, recogniser: Recogniser) -> str | None:
    match = _FRAME.fullmatch(line)
    if match is None:
        return None
    path, function = recogniser.path(match["path"]), recogniser.function(match["function"])
    return f'{match["indent"]}File "{path}", line {match["line"]}{match["comma"]} in {function}'


def stack(text: str, recogniser: Recogniser) -> str:
    """Redact a stack from faulthandler with ``recogniser``. Threads get numbers in place of their addresses."""
    threads: dict[str, int] = {}

    def lines() -> Iterator[str | None]:
        before, line = "", ""
        for row in text.splitlines():
            before, line = line, row[:MAX_TEXT]
            thread = _THREAD.fullmatch(line)
            if thread is not None:
                number = threads.setdefault(thread["id"], len(threads) + 1)
                yield f"{thread['current']} 0x{number:016x}{thread['end']}"
            else:
                frame = _frame(line, recogniser)
                yield frame if frame is not None else _log_line(line, before, recogniser)

    return _joined(lines())


def _joined(lines: Iterable[str | None]) -> str:
    """Join the lines. None stands for a dropped line; "[N lines left out]" replaces N consecutive dropped lines."""
    kept: list[str] = []
    gone = 0
    for line in (*lines, ""):
        if line is None:
            gone += 1
            continue
        if gone:
            kept.append(f"[{gone} line{'s' * (gone != 1)} left out]")
            gone = 0
        kept.append(line)
    return "\n".join(kept)


def machine(text: str, keep: Callable[[str], str | None], recogniser: Recogniser) -> str:
    """Redact a description of a machine (versions, hardware, variables): replace each line by the result of ``keep``.

    If this result is None, the line is kept only with --with-logs, and only if the search of ``recogniser`` finds
    nothing in it that could be private.
    """
    kept: list[str] = []
    before, line = "", ""
    for row in text.splitlines():
        before, line = line, plain(row[:MAX_TEXT]).rstrip()
        known = keep(line) if line.strip() else ""
        if known is None:
            known = recogniser.free(line, before)
        recogniser.left_out["variables"] += known is None or GONE in known
        if known is not None:
            kept.append(known)
    return "\n".join(kept) + "\n" if kept else ""
