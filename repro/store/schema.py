"""Convert JSON strictly to a declared type, with errors that name the file and the field; and back to JSON.

A type is a ``msgspec.Struct`` or a dataclass. Fields without a default are required, and unknown fields are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hybrid_moe_ref.files import MAX_JSON_BYTES, DamagedFile, read_json

T = TypeVar("T")


def read_typed(path: Path, kind: type[T], most: int = MAX_JSON_BYTES) -> T:
    """Read a JSON file of at most ``most`` bytes. Size and depth are limited as in :func:`read_json`.

    Raises OSError if the file cannot be read, and DamagedFile with file, field and problem if it is malformed:
    ``verdict.json:1: $.waits[3].rank: expected int, got str``.
    """
    return typed(read_json(path, most), kind, f"{path}:1")


def typed(value: Any, kind: type[T], where: str) -> T:
    """Convert a JSON value to a type.

    Raises DamagedFile, whose text begins with ``where`` and the path of the field.
    """
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        problem, _, field = str(error).replace("`", "").partition(" - at ")
        raise DamagedFile(f"{where}: {field or '$'}: {problem[:1].lower()}{problem[1:]}") from None


def to_json(value: Any) -> Any:
    """Convert a typed value to JSON types. The keys of mappings become strings."""
    return msgspec.to_builtins(value, str_keys=True)
