"""Check a bundle before it is written: search its files for the names of this machine, its user and the run's hosts."""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from pathlib import Path

from repro.bundle.redact.recognise import form_of
from repro.bundle.redact.words import is_token
from repro.report.page.page import script, style
from repro.store.run_dir import SUFFIX

_GENERATED = ("report.html", "timeline.svg", "trace.json", "repro.py", "ISSUE.md", "COMMANDS.sh")


class LeakError(RuntimeError):
    """A redacted file still contains a private name, so no bundle was written."""


def private_values(variables: Mapping[str, str]) -> set[str]:
    """Return the user's name and home folder, and the values of environment variables that are probably secrets.

    The name of a variable shows that it is probably a secret, for example "MY_TOKEN".
    """
    try:
        user = variables.get("USER") or getpass.getuser()
    except (KeyError, OSError):
        user = ""
    home = variables.get("HOME", "").rstrip("/")
    secret = re.compile("secret|passw|passphrase|credential|token|key|pass$|pwd|cookie|auth|_pat$", re.IGNORECASE)
    return {user, home if home.count("/") > 1 else ""} | {
        value for name, value in variables.items() if secret.search(name) and ("-" in value or not is_token(value))
    }


def refuse_leaks(folder: Path, private: frozenset[str]) -> None:
    """Raise LeakError if a file in `folder` still contains a name in `private`.

    This search does not use the rules of redaction, so it also finds mistakes of these rules. The search ignores names
    that a file can contain by chance:

    - in files with sentences of this program, names that consist of letters only;
    - in witnesses, which are binary, names of fewer than six characters.
    """
    patterns = [(name, re.compile(form_of(name).encode(), re.IGNORECASE)) for name in sorted(private)]
    page = [style().encode(), script().encode()]
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        generated = path.name in _GENERATED
        for own in page if path.name == "report.html" else ():
            data = data.replace(own, b"")
        for name, pattern in patterns:
            if (generated and name.isalpha()) or (path.suffix == SUFFIX and len(name) < 6):
                continue  # a word of our own sentences, or bytes of a binary file that equal a short name by chance
            if pattern.search(data):
                raise LeakError(
                    f"{path.relative_to(folder)} still contains a name of this machine or user, so no bundle was "
                    "written"
                )
