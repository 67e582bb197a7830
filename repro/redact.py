"""Take out of a run's files what a stranger should not read: secrets, names of people and machines, places on disks.

Each rule can be kept off (``--keep-hostnames``). Names that stand for different things stay different: hosts become
host-1, host-2, so that who waits for whom is still told. What was replaced is counted, and what must be nowhere can
be looked for afterwards in bytes.
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repro.layout import CRC, HEADER, LENGTH, Geometry, pack_header
from repro.parse import parse_header, parse_strings

RULES = {
    "secrets": "values of variables and options named like a secret, token, key or password",
    "hostnames": "names of hosts and their boot ids",
    "users": "user names",
    "addresses": "IP and MAC addresses",
    "paths": "folders of files, home folders among them; the file's own name stays",
}

ROOT = Path(__file__).resolve().parents[1]
_WORDS = r"secret|token|key|passwd|password|credential"
_VARIABLE = re.compile(rf"\b([A-Z0-9_]*(?:{_WORDS.upper()})[A-Z0-9_]*)(['\"]?\s*[=:]\s*['\"]?)([^\s'\",;]+)")
_OPTION = re.compile(rf"(--[\w-]*(?:{_WORDS})[\w-]*)(['\"]?[=,\s]\s*['\"]?)([^\s'\",;]+)")
_NAME = re.compile(rf"[A-Z0-9_]*(?:{_WORDS.upper()})[A-Z0-9_]*")
_NUMBERS = re.compile(r"[\d.,]+")
_V4 = re.compile(r"(?<![\d.=])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_V6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?:%\w+)?(?![\w:])")
_MAC = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![\w:])")
_PATH = re.compile(r"(?<![\w.<>~/])(?:~|/[\w.@+%~-]+)(?:/[\w.@+%~-]+)+/?")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'<>]+", re.IGNORECASE)
_PUBLIC = ("/proc/", "/dev/", "/sys/", "/usr/lib/", "/usr/bin/", "/lib/", "/bin/")
_COMMON_USERS = {"root", "user", "admin", "ubuntu", "nobody", "runner"}
_LEAST = 4  # characters of a literal that is looked for anywhere, not only as a word


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
        secrets = {
            value for name, value in environment.items() if re.search(_WORDS, name, re.IGNORECASE) and len(value) >= 6
        }
        redactor.literals["secrets"] = {value for value in secrets if not _NUMBERS.fullmatch(value)}
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
        stand_in = self.hosts.get(short) or f"host-{len(set(self.hosts.values())) + 1}"
        self.hosts[short] = self.hosts[name] = stand_in

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
            return [self.document(item) for item in value]
        if not isinstance(value, dict):
            return value
        hide = "secrets" not in self.keep
        return {
            self.text(key): self._count("secrets", "<secret>")
            if hide and isinstance(item, str) and _NAME.fullmatch(key)
            else self.document(item)
            for key, item in value.items()
        }

    def _count(self, rule: str, stand_in: str) -> str:
        self.removed[rule] += 1
        return stand_in

    def _secrets(self, text: str) -> str:
        for value in self.literals.get("secrets", ()):
            if value in text:
                self.removed["secrets"] += text.count(value)
                text = text.replace(value, "<secret>")

        def hide(match: re.Match[str]) -> str:
            if _NUMBERS.fullmatch(match[3]) or match[3].startswith("<secret>"):
                return match[0]
            return self._count("secrets", f"{match[1]}{match[2]}<secret>")

        return _OPTION.sub(hide, _VARIABLE.sub(hide, text))

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
        text = re.sub(r"[^\s\"'=:,(]*/site-packages/", "site-packages/", text)
        text = _URL.sub(lambda match: match[0] if "@" not in match[0] else self._count("paths", "<url>"), text)
        return _PATH.sub(self._path, text)

    def _path(self, match: re.Match[str]) -> str:
        path = match[0]
        if path.startswith(_PUBLIC):
            return path
        return self._count("paths", f"<path>/{path.rstrip('/').rpartition('/')[2]}")

    def _users(self, text: str) -> str:
        for user in self.literals.get("users", ()):
            text = self._word(text, user, "<user>", "users")
        return text

    def _hostnames(self, text: str) -> str:
        for name in sorted(self.hosts, key=len, reverse=True):
            text = self._word(text, name, self.hosts[name], "hostnames")
        return text

    def _word(self, text: str, word: str, stand_in: str, rule: str) -> str:
        if word not in text:
            return text
        return re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", lambda match: self._count(rule, stand_in), text)

    def forbidden(self) -> dict[bytes, str]:
        """Texts that must be in no file afterwards, with their rule; short ones are only ever looked for as words."""
        found = {
            text.encode(): rule for rule, texts in self.literals.items() if rule not in self.keep for text in texts
        }
        if "hostnames" not in self.keep:
            found |= {name.encode(): "hostnames" for name in self.hosts}
        return {text: rule for text, rule in found.items() if len(text) >= _LEAST}


def redact_witness(data: bytes, name: str, redactor: Redactor) -> bytes:
    """A witness with its header and strings redacted, every id as it was.

    Raises WitnessError for what is no witness.
    """
    who, shape = parse_header(data, name)
    if "hostnames" not in redactor.keep:
        redactor.name_host(who.hostname)
    problems: list[str] = []
    strings = parse_strings(data, shape, name, problems)[1:]
    who = replace(
        who,
        hostname=redactor.text(who.hostname),
        boot_id=redactor.name_boot(who.boot_id),
        run_id=redactor.text(who.run_id),
    )
    header = pack_header(who, shape)
    body = header.ljust(HEADER.size + CRC.size, b"\0") + data[HEADER.size + CRC.size : shape.strings_at]
    return body + _pack_strings(strings, shape, redactor.text).ljust(max(0, len(data) - shape.strings_at), b"\0")


def _pack_strings(strings: Iterable[str], shape: Geometry, change: Callable[[str], str]) -> bytes:
    """The string area; where stand-ins take more room than is there, the last strings are cut short, none is lost."""
    packed = bytearray()
    encoded = [change(text).encode() for text in strings]
    left = sum(len(text) + LENGTH.size for text in encoded)
    for text in encoded:
        over = max(0, len(packed) + left - shape.string_bytes)
        left -= len(text) + LENGTH.size
        text = text[: max(1, len(text) - over)] if text else b"?"
        packed += LENGTH.pack(len(text)) + text
    return bytes(packed)
