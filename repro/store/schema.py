"""Convert JSON strictly to a declared type, and a typed value back to JSON. Errors name the file and the field.

The declared type is a ``msgspec.Struct`` or a dataclass. A field without a default is required; an unknown field of the
JSON is ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hybrid_moe_ref.files import MAX_JSON_BYTES, DamagedFile, read_json

T = TypeVar("T")


def read_typed(path: Path, kind: type[T], most: int = MAX_JSON_BYTES) -> T:
    """Read a JSON file of at most ``most`` bytes, and convert its content to the type ``kind``.

    Raises OSError if the file cannot be read, and DamagedFile if its content is too large, is nested too deeply, or
    does not fit the type: ``verdict.json:1: $.waits[3].rank: expected int, got str``.
    """
    return typed(read_json(path, most), kind, f"{path}:1")


def typed(value: Any, kind: type[T], where: str) -> T:
    """Convert a JSON value to the type ``kind``.

    where   the file and line of the value, "verdict.json:1"; the message of an error begins with it

    Raises DamagedFile if the value does not fit: ``verdict.json:1: $.waits[3].rank: expected int, got str``.
    """
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        problem, _, field = str(error).replace("`", "").partition(" - at ")
        raise DamagedFile(f"{where}: {field or '$'}: {problem[:1].lower()}{problem[1:]}") from None


def to_json(value: Any) -> Any:
    """Convert a typed value to what ``json`` can write: dicts with strings as keys, lists, strings and numbers."""
    return msgspec.to_builtins(value, str_keys=True)
