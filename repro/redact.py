"""Take out of a run's files what a stranger should not read: secrets, names of people and machines, places on disks.

Each rule can be kept off (``--keep-hostnames``). Names that stand for different things stay different: hosts become
host-1, host-2, so that who waits for whom is still told. What was replaced is counted, and what must be nowhere can
be looked for afterwards in bytes, in any case and inside of longer words.

A name that is also a word of this program (a user called repro) is replaced only where it stands as a name, or the
commands and verdicts of the bundle would no longer say what they say.
"""

from __future__ import annotations

import functools
import getpass
import ipaddress
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repro.compact import compact
from repro.parse import parse_header

RULES = {
    "secrets": "values of variables and options named like a secret, token, key or password",
    "hostnames": "names of hosts and their boot ids",
    "users": "user names",
    "addresses": "IP and MAC addresses",
    "paths": "folders of files, home folders among them; the file's own name stays",
}

ROOT = Path(__file__).resolve().parents[1]

# What names a secret: some words wherever they stand in a name, "token" and "key" where they end it (a tokenizer and
# max_tokens are none), "key" only after another word, and in capitals, as in the environment, all of them anywhere.
_SECRET = r"(?:secret|passw|passphrase|credential)"
_NAME = (
    rf"[\w-]{{0,64}}{_SECRET}[\w-]{{0,64}}|(?:[\w-]{{0,64}}[_-])?token|[\w-]{{1,64}}[_-]key|[\w-]{{0,64}}apikey"
    r"|(?-i:\w{0,64}[a-z](?:Token|Key)|[A-Z0-9_]{0,64}(?:TOKEN|KEY)[A-Z0-9_]{0,64})"
)
_VALUE = r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s'\"]+?(?=[,;)\]}]{0,8}(?:[\s'\"]|$)))"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_PASSWORD_NAME = re.compile(rf"[\w-]*{_SECRET}[\w-]*", re.IGNORECASE)
_OPTION_NAME = re.compile(rf"--(?:{_NAME}|key)", re.IGNORECASE)
_SECRETS = (
    re.compile(
        rf"(?P<name>[?&][\w.-]{{0,64}}(?:{_SECRET}|token|key|sig)[\w.-]{{0,64}}=)(?P<value>[^&\s\"'<>#]+)",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?P<name>\bauthorization[\"']?[ \t]*[:=][ \t]*[\"']?(?:\w+[ \t]+)?)(?P<value>[^\s\"']+)", re.IGNORECASE
    ),
    re.compile(r"(?P<name>\bbearer[ \t]+)(?P<value>[\w.~+/=-]{8,})", re.IGNORECASE),
    re.compile(rf"(?P<name>(?<![\w-])(?:{_NAME})[\"']?[ \t]*[=:][ \t]*){_VALUE}", re.IGNORECASE),
    re.compile(rf"(?P<name>(?<![\w-])--(?:{_NAME}|key)[\"']?[=,\s][ \t]*)(?!--){_VALUE}", re.IGNORECASE),
)
_SHAPES = re.compile(  # what is a secret whatever its name, as its issuer writes it
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
    r"|\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[\w-]{16,}|xox[abp]-[\w-]{10,}"
    r"|AKIA[A-Z0-9]{16}|eyJ[\w-]{10,200}\.[\w-]{10,4096}\.[\w-]*)"
)
_NUMBERS = re.compile(r"[\d.,]+")
_V4 = re.compile(r"(?<![\d.])(?<!==)(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)")  # after == stands a version
_V6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?:%\w+)?(?![\w:])")
_MAC = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![\w:])")
_INSIDE = r"(?:/[\w.@+%~-]+)"
_PATH = re.compile(rf"(?:(?<![\w.<>~/])|(?<=-[ILFB])|(?<=-isystem)|(?<=file://))(?:~[\w.-]*|/[\w.@+%~-]+){_INSIDE}+/?")
_QUOTED_PATH = re.compile(r"(?<=[\"'])/[^\"'\n/]+/[^\"'\n]+(?=[\"'])")  # may hold blanks
_HOME = re.compile(r"/(?:home|Users)/[^/]+/?|~[\w.-]*/?")
_INSTALLED = re.compile(r"(?<![^\s\"'=:,(])(-[ILFB]|-isystem)?[^\s\"'=:,(]*?/site-packages/")
_URL = re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,20}://[^\s\"'<>]+", re.IGNORECASE)
_PUBLIC = ("/proc/", "/dev/", "/sys/", "/usr/lib/", "/usr/bin/", "/lib/", "/bin/")
_COMMON_USERS = {"root", "user", "admin", "ubuntu", "nobody", "runner"}
_DISTINCT = 6
"""Characters from which on a name is replaced inside of longer words too."""


@dataclass
class Redactor:
    """Replaces text by rule; one for all files of a bundle, so that equal names get equal stand-ins.

    keep      rules that are off
    hosts     host name -> stand-in
    literals  rule -> texts that must be nowhere afterwards
    """

    keep: frozenset[str] = frozenset()
    hosts: dict[str, str] = field(default_factory=dict)
    literals: dict[str, set[str]] = field(default_factory=dict)
    removed: Counter[str] = field(default_factory=Counter)
    _boots: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_this_machine(cls, keep: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> Redactor:
        """One that knows this machine's names and the secrets in this process's environment."""
        environment = os.environ if environment is None else environment
        redactor = cls(frozenset(keep))
        redactor.name_host(socket.gethostname())
        redactor.name_host(socket.getfqdn())
        redactor.literals["secrets"] = {
            value
            for name, value in environment.items()
            if re.search(rf"{_SECRET}|token|key", name, re.IGNORECASE)
            and len(value) >= _DISTINCT
            and not _NUMBERS.fullmatch(value)
            and not _is_own_word(value)
        }
        try:
            user = environment.get("USER") or getpass.getuser()
        except (KeyError, OSError):
            user = ""
        redactor.literals["users"] = {user} - _COMMON_USERS - {""}
        home = environment.get("HOME", "")
        redactor.literals["paths"] = {home.rstrip("/")} if home.count("/") > 1 else set()
        return redactor

    def name_host(self, name: str) -> None:
        """Have a host's name replaced from here on, its short form too."""
        short = name.partition(".")[0]
        if not short or short == "localhost" or _NUMBERS.fullmatch(name):
            return
        stand_in = self.hosts.get(short) or self.hosts.get(name) or f"host-{len(set(self.hosts.values())) + 1}"
        self.hosts[name] = stand_in
        if not _NUMBERS.fullmatch(short):
            self.hosts[short] = stand_in

    def host(self, name: str) -> str:
        """What stands for a host where only a host can stand."""
        if "hostnames" in self.keep or name not in self.hosts:
            return self.text(name)
        return self._count("hostnames", self.hosts[name])

    def name_boot(self, boot_id: str) -> str:
        """The stand-in of a boot id, which tells machines apart."""
        if not boot_id or "hostnames" in self.keep:
            return boot_id
        return self._boots.setdefault(boot_id, f"boot-{len(self._boots) + 1}")

    def text(self, text: str) -> str:
        """The text with everything replaced that a rule names."""
        for rule, apply in (
            ("secrets", self._secrets), ("addresses", self._addresses), ("paths", self._paths),
            ("users", self._users), ("hostnames", self._hostnames),
        ):  # fmt: skip
            if rule not in self.keep:
                text = apply(text)
        return text

    def document(self, value: Any) -> Any:
        """A JSON value with the strings in it redacted, keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [
                self._hidden(item) if self._is_secret(_OPTION_NAME, before) else self.document(item)
                for before, item in zip([None, *value], value, strict=False)
            ]
        if not isinstance(value, dict):
            return value
        return {
            self.text(key): self._hidden(item, bool(_PASSWORD_NAME.fullmatch(key)))
            if self._is_secret(_SECRET_NAME, key)
            else self.document(item)
            for key, item in value.items()
        }

    def _is_secret(self, names: re.Pattern[str], name: object) -> bool:
        return "secrets" not in self.keep and isinstance(name, str) and names.fullmatch(name) is not None

    def _hidden(self, value: Any, numbers: bool = False) -> Any:
        """The value of a secret's name: its strings gone at every depth; a number may be a count, or a password."""
        if isinstance(value, list):
            return [self._hidden(item, numbers) for item in value]
        if isinstance(value, dict):
            return {self.text(key): self._hidden(item, numbers) for key, item in value.items()}
        if isinstance(value, str) and (numbers or not _NUMBERS.fullmatch(value)) and value:
            return self._count("secrets", "<secret>")
        if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            return self._count("secrets", "<secret>")
        return value

    def _count(self, rule: str, stand_in: str) -> str:
        self.removed[rule] += 1
        return stand_in

    def _secrets(self, text: str) -> str:
        for value in sorted(self.literals.get("secrets", ()), key=len, reverse=True):
            if value in text:
                self.removed["secrets"] += text.count(value)
                text = text.replace(value, "<secret>")
        text = _SHAPES.sub(lambda match: self._count("secrets", "<secret>"), text)
        for pattern in _SECRETS:
            text = pattern.sub(self._secret, text)
        return text

    def _secret(self, match: re.Match[str]) -> str:
        value = match["value"]
        quote = value[0] if value[0] in "\"'" else ""
        plain = value.strip(quote) if quote else value
        if not plain or _NUMBERS.fullmatch(plain) or plain.startswith("<secret>"):
            return match[0]
        return self._count("secrets", f"{match['name']}{quote}<secret>{quote}")

    def _addresses(self, text: str) -> str:
        text = _MAC.sub(lambda match: self._count("addresses", "<mac>"), text)
        return _V6.sub(self._address, _V4.sub(self._address, text))

    def _address(self, match: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        if address.is_loopback or address.is_unspecified:
            return match[0]
        return self._count("addresses", "<address>")

    def _paths(self, text: str) -> str:
        text = text.replace(f"{ROOT}/", "")
        text = _INSTALLED.sub(lambda match: f"{match[1] or ''}site-packages/", text)
        text = _URL.sub(lambda match: match[0] if "@" not in match[0] else self._count("paths", "<url>"), text)
        text = _QUOTED_PATH.sub(self._path, text)
        for home in self.literals.get("paths", ()):  # wherever it stands, after whatever letter
            text = re.sub(rf"{re.escape(home)}(?![\w-])(?:{_INSIDE}+/?)?", self._path, text)
        return _PATH.sub(self._path, text)

    def _path(self, match: re.Match[str]) -> str:
        path = match[0].rstrip("/")
        if path.startswith(_PUBLIC):
            return match[0]
        if path in self.literals.get("paths", ()) or _HOME.fullmatch(path):
            return self._count("paths", "<home>")
        return self._count("paths", f"<path>/{path.rpartition('/')[2]}")

    def _users(self, text: str) -> str:
        for user in self.literals.get("users", ()):
            text = self._name(text, user, "<user>", "users")
        return text

    def _hostnames(self, text: str) -> str:
        for name in sorted(self.hosts, key=len, reverse=True):
            text = self._name(text, name, self.hosts[name], "hostnames")
        return text

    def _name(self, text: str, name: str, stand_in: str, rule: str) -> str:
        if len(text) < len(name) or name.lower() not in text.lower():
            return text
        return _pattern(name).sub(lambda match: self._count(rule, stand_in), text)

    def forbidden(self) -> Iterator[tuple[re.Pattern[bytes], str, bool]]:
        """What must be in no file afterwards, with its rule: plain text, names in any case, not the rules' patterns.

        Of a name too short for that, the last value is false: it is looked for as a word, in files of text alone.
        """
        found = {text: rule for rule, texts in self.literals.items() for text in texts}
        found |= dict.fromkeys(self.hosts, "hostnames")
        for text, rule in found.items():
            if rule in self.keep or _is_own_word(text):
                continue
            plain, anywhere = re.escape(text.encode()), _is_distinct(text) or rule in ("secrets", "paths")
            if not anywhere:
                plain = rb"(?<![A-Za-z0-9\x80-\xff])" + plain + rb"(?![A-Za-z0-9\x80-\xff])"
            exact = rule in ("secrets", "paths")  # a secret in another case is none
            yield re.compile(plain, 0 if exact else re.IGNORECASE), rule, anywhere


@functools.cache
def _own_text() -> str:
    """What this program is written in, and so writes: its sources, and the names of Python's modules. Kernels write
    nothing; their words are those of mathematics, and names of hosts too."""
    folders = [ROOT / name for name in ("repro", "hybrid_moe_ref")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".txt", ".js", ".html")]
    return "\n".join([*(path.read_text(errors="replace") for path in files), *sys.stdlib_module_names]).lower()


def _alone(name: str) -> str:
    return rf"(?<![^\W_]){re.escape(name)}(?![^\W_])"


@functools.cache
def _is_own_word(name: str) -> bool:
    return re.search(_alone(name.lower()), _own_text()) is not None


@functools.cache
def _is_distinct(name: str) -> bool:
    return len(name) >= _DISTINCT and name.lower() not in _own_text()


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    """Where a name of a person or host is to be replaced."""
    if _is_own_word(name):
        word, owner = re.escape(name), "|".join(("user", "logname", "hostname", "host", "node", "machine"))
        told = "|".join(rf"(?<={kind}{sign})" for kind in owner.split("|") for sign in ("=", ": "))
        return re.compile(rf"(?<=@){word}(?![\w-])|(?<![\w-]){word}(?=@)|(?:{told}){word}(?![\w-])", re.IGNORECASE)
    return re.compile(re.escape(name) if _is_distinct(name) else _alone(name), re.IGNORECASE)


def redact_witness(data: bytes, name: str, redactor: Redactor) -> bytes:
    """Redact the header and the strings of a witness, every id as it was; the copy is as short as it can be.

    Raises WitnessError for what is no witness.
    """
    who, _ = parse_header(data, name)
    if "hostnames" not in redactor.keep:
        redactor.name_host(who.hostname)
    who = replace(
        who,
        hostname=redactor.host(who.hostname),
        boot_id=redactor.name_boot(who.boot_id),
        run_id=redactor.text(who.run_id),
    )
    return compact(data, name, who=who, change=redactor.text)
