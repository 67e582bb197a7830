"""Keep the recognised strings of a run, and replace or leave out all other strings.

A name that is not recognised is replaced by a stand-in ("name-003", "host-1"). Equal names get equal stand-ins, and
different names get different stand-ins. So ranks that issued different collectives still differ, and the verdict stays
the same. Text that is not recognised, such as a log line, is left out and counted.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from repro.bundle.redact.words import below_package, is_file, is_name, is_token, is_word, plain
from repro.trace.witness.format import ENTRY_SEPARATOR, SEPARATOR

LEFT_OUT = {
    "text": "messages, and lines of logs and stacks",
    "names": "names of layers, groups, files, functions and locks that are not in the list of known words",
    "identity": "names and boot ids of hosts, and numbers of pid namespaces",
    "variables": "environment variables and lines about the machine",
    "fields": "fields of JSON files",
    "files": "files that runs of this program do not leave",
}
"""Kinds of content that are counted when they are left out or replaced, and a description of each kind."""

GONE = "(left out)"
MAX_TEXT = 4000
"""Longest text in characters that can stay; longer lines of logs are cut. Texts of this program are shorter."""
_MEMBERS = re.compile(r"\d{1,5}(?:,\d{1,5})*")
_SITE = re.compile(r"(?P<path>[^\n]+?):(?P<line>\d{1,7}) (?P<function>\S+)")
_RUN = re.compile(r"\d{8}T\d{6}\.\d{3}Z-(?P<scenario>[a-z0-9_]+)-(?:control|fault|fix)-\d{1,7}")
_TRANSFER = re.compile(r"(?P<group>.+)(?P<ends>:\d{1,6}>\d{1,6})")
_ERROR = re.compile(r"(?P<type>[A-Za-z_][\w.]{0,120}): (?P<message>.*)", re.DOTALL)
_ABSOLUTE = re.compile(r"/[^\s'\"]+(?:/[^\s'\"]+)*")
_AROUND = "()[]{}<>\"'`.,;:"
_LOCATED = re.compile(r"(?P<path>/[\w./+@-]+?)(?P<line>(?::\d{1,6})?)")
_STAND_IN = re.compile(r"([a-z]+-\d{1,6})(?:\.[a-z]{2,4})?(?:/(?P<file>[\w.]+))?(?::\d{1,7}(?:>\d{1,6})?)?")
_GROUPED = re.compile(r"(?<!\S)\d{2,6}(?: \d{2,6}){2,}(?!\S)")  # a credit card or telephone number
_BRACKETED = re.compile(r"\[(/[^\s\]]+?)((?::\d{1,6})?)\]")


@dataclass
class Recogniser:
    """Redacts the strings of one bundle: keeps only text that it recognises, because this text is known to be harmless.

    All files share one recogniser, so that equal strings get equal stand-ins.

    private    names that are always replaced, even if they consist of known words, such as "gpu-node"
    search     given with --with-logs: called with text that is not recognised, returns True to keep the text. Without
               a search, such text is left out
    left_out   how often something was left out or replaced, by the kind of content: "names", "text", "files", …
    hosts      for each host name, its stand-in
    """

    private: frozenset[str] = frozenset()
    search: Callable[[str], bool] | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    hosts: dict[str, str] = field(default_factory=dict)
    _boots: dict[str, str] = field(default_factory=dict)
    _namespaces: dict[int, int] = field(default_factory=dict)
    _stand_ins: dict[tuple[str, str], str] = field(default_factory=dict)
    _issued: set[str] = field(default_factory=set)
    _strings: dict[str, str] = field(default_factory=dict)
    _sources: dict[str, str] = field(default_factory=dict)
    _numbers: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        forms = [form_of(name) for name in sorted(self.private)]
        self._private = re.compile("|".join(forms), re.IGNORECASE) if forms else None

    # -- identity ----------------------------------------------------------------------------------------------------

    def host(self, name: str) -> str:
        """Return the stand-in of a host name, and count the name in ``left_out``."""
        if not name:
            return name
        self.left_out["identity"] += 1
        return self.name_host(name)

    def name_host(self, name: str) -> str:
        """Return the stand-in of a host name. The short and the fully qualified form of a name share one stand-in."""
        short = name.partition(".")[0]
        stand_in = self.hosts.get(name) or self.hosts.get(short) or f"host-{len(set(self.hosts.values())) + 1}"
        self.hosts[name] = self.hosts[short] = stand_in
        self._issued.add(stand_in)
        return stand_in

    def boot(self, boot_id: str) -> str:
        """Return the stand-in of a boot id. Different machines get different stand-ins."""
        if not boot_id:
            return boot_id
        self.left_out["identity"] += 1
        return self._boots.setdefault(boot_id, f"boot-{len(self._boots) + 1}")

    def namespace(self, number: int) -> int:
        """Replace the number of a pid namespace by a small number. 0, which means unknown, stays."""
        if not number:
            return number
        self.left_out["identity"] += 1
        return self._namespaces.setdefault(number, len(self._namespaces) + 1)

    # -- strings that must stay distinct -----------------------------------------------------------------------------

    def string(self, text: str) -> str:
        """Redact a string such as a name, a path, a call site or an error message.

        What is not known to be harmless becomes a stand-in. Equal strings have equal results. Different strings
        have different results, but two different call sites can have the same result.
        """
        known = self._strings.get(text)
        if known is None:
            known = self._string(text)
            if not _SITE.fullmatch(text) and self._sources.setdefault(known, text) != text:
                known = self.stand_in("text", text)  # two different locks must not get one name
            self._strings[text] = known
        return known

    def _string(self, text: str) -> str:
        if ENTRY_SEPARATOR in text or SEPARATOR in text:
            entries = (entry.split(SEPARATOR) for entry in text.split(ENTRY_SEPARATOR))
            return ENTRY_SEPARATOR.join(SEPARATOR.join(map(self.string, entry)) for entry in entries)
        if not text or text in self._issued or _are_members(text):
            return text
        if (run := _RUN.fullmatch(text)) is not None and is_name(run["scenario"]):
            return text
        if (transfer := _TRANSFER.fullmatch(text)) is not None:
            return f"{self.string(transfer['group'])}{transfer['ends']}"
        if (site := _SITE.fullmatch(text)) is not None:
            return f"{self.path(site['path'])}:{site['line']} {self.function(site['function'])}"
        if _ABSOLUTE.fullmatch(text):
            return self.path(text)
        if (error := _ERROR.fullmatch(text)) is not None and is_error(error["type"]):
            return f"{error['type']}: {self._text(error['message']) or self.stand_in('message', error['message'])}"
        return self._text(text) or self.stand_in("text" if " " in text else "name", text)

    def function(self, text: str) -> str:
        """Redact a function name. A name that is not known to be harmless is replaced by a stand-in.

        With a search (--with-logs), such a name is kept if one of its words is known and the search finds nothing in
        the name that could be private.
        """
        partly = any(len(part) > 2 and is_word(part) for part in re.split(r"[._]", text))
        known = is_name(text) and not self.is_private(text)
        return text if known or (partly and self._is_free(text)) else self.stand_in("function", text)

    def path(self, text: str) -> str:
        """Shorten a path to the part that begins at its package, if the package is known.

        For any other path with a recognised file name, keep the file name and replace the folder by a stand-in. Replace
        any other path as a whole by a stand-in; the extensions .py, .so, .cpp and .lock stay.
        """
        if re.fullmatch(r"<frozen [a-z_.]{1,40}>", text):
            return text if is_name(text[8:-1]) else "<frozen>"
        inside = below_package(text)
        if inside is not None and not self.is_private(inside):
            return inside
        folder, slash, file = text.rpartition("/")
        if (is_file(file) or is_name(file)) and not self.is_private(file):
            return f"{self.stand_in('folder', folder)}/{file}" if slash and folder else file
        extension = re.search(r"\.(?:py|so|cpp|lock)$", text)
        return self.stand_in("file", text) + (extension[0] if extension else "")

    def stand_in(self, noun: str, text: str) -> str:
        """Return the stand-in of `text`: `noun` with a number, such as "name-001". Equal texts get equal numbers."""
        self.left_out["text" if noun in ("text", "message") else "names"] += 1
        known = self._stand_ins.get((noun, text))
        if known is None:
            self._numbers[noun] += 1
            known = self._stand_ins[noun, text] = f"{noun}-{self._numbers[noun]:03d}"
            self._issued.add(known)
        return known

    # -- text that may be dropped ------------------------------------------------------------------------------------

    def line(self, text: str, before: str = "") -> str:
        """Return the line, with shortened paths, if it may stay; otherwise count it in ``left_out`` and return "".

        A line may stay if `recognised` accepts it. With ``search`` (--with-logs), a line may also stay if this search
        finds nothing private in it and in ``before``.

        before: the line above. It can name a secret whose value is in this line
        """
        kept = self._text(text) if not before or self._is_free(before) else self.recognised(text)
        if kept is None:
            self.left_out["text"] += 1
        return kept or ""

    def recognised(self, text: str) -> str | None:
        """Return the text with shortened paths; None if the text is not recognised.

        A text is not recognised in these cases:

        - one of its tokens is not recognised;
        - it contains a private name, or digits that look like a telephone number or a credit card number;
        - it is longer than MAX_TEXT.
        """
        if len(text) > MAX_TEXT or _GROUPED.search(text):
            return None
        text = _BRACKETED.sub(lambda match: f"[{self._inside(match[1])}{match[2]}]", plain(text))
        tokens = text.split(" ")
        kept = [self._token(token) for token in tokens]
        result = " ".join(map(str, kept))
        return None if None in kept or self.is_private(result) else result

    def is_private(self, text: str) -> bool:
        return self._private is not None and self._private.search(text) is not None

    def _inside(self, path: str) -> str:
        return below_package(path) or "…"

    def _token(self, token: str) -> str | None:
        bare = token.strip(_AROUND)
        if is_token(token) or self._is_stand_in(bare):
            return token
        located = _LOCATED.fullmatch(bare)
        return token.replace(bare, self.path(located["path"]) + located["line"]) if located else None

    def _is_stand_in(self, bare: str) -> bool:
        """Whether a token is a stand-in of this bundle.

        The token can also have, after the stand-in, a file name and a line ("folder-001/runner.py:7") or the two ranks
        of a point-to-point transfer ("name-001:0>1").

        bare: the token without the punctuation around it
        """
        match = _STAND_IN.fullmatch(bare)
        return (
            match is not None
            and match[1] in self._issued
            and (not match["file"] or is_file(match["file"]) or is_name(match["file"]))
        )

    def _text(self, text: str) -> str | None:
        kept = self.recognised(text)
        if kept is None and self._is_free(text):
            kept = " ".join(plain(text).split())
        return kept

    def free(self, text: str, before: str = "") -> str | None:
        """Return a text not known to be harmless, without escapes and invisible characters; None to leave it out.

        The text stays only if ``search`` is given (--with-logs) and finds nothing private in the text and in
        ``before``.

        before: the line above. It can name a secret whose value is in the text
        """
        return plain(text) if self._is_free(text) and (not before or self._is_free(before)) else None

    def _is_free(self, text: str) -> bool:
        """Whether text not known to be harmless can stay: ``search`` is given, and finds nothing private."""
        return self.search is not None and len(text) <= MAX_TEXT and self.search(text)


def _are_members(text: str) -> bool:
    """Whether a text lists the ranks of a group without duplicates: "0,1,2"."""
    ranks = text.split(",")
    return _MEMBERS.fullmatch(text) is not None and len(set(ranks)) == len(ranks)


def is_error(name: str) -> bool:
    """Whether a name looks like an exception: what follows its last dot is capitalised, and all its words are known."""
    last = name.rpartition(".")[2]
    return is_name(name) and last[:1].isupper() and not (last.isupper() and is_word(last) and len(last) < 8)


def distinct(names: Iterable[str]) -> frozenset[str]:
    """Return the names that are worth searching for, because a harmless text seldom contains them.

    These are the names that are not in words.txt (the list of harmless words), are not numbers, and are longer than two
    characters.
    """
    return frozenset(name for name in names if len(name) > 2 and not is_word(name) and not name.isdigit())


def form_of(name: str) -> str:
    """Return a search pattern for a private name.

    A name of fewer than six characters is found only as a whole word; a longer name also as a part of a word.
    """
    plain = re.escape(name)
    return plain if len(name) >= 6 else rf"(?<![A-Za-z0-9]){plain}(?![A-Za-z0-9])"


def this_machine() -> list[str]:
    """Return the names of the host that makes the bundle."""
    return sorted({socket.gethostname(), socket.getfqdn()} - {"", "localhost"})
