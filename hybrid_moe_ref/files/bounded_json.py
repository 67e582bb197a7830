"""Read JSON from files that other programs can write, with bounds on the size and depth of the JSON.

A small file can take much memory when it is parsed, for example a file of many brackets. So the functions here estimate
the memory and the depth before they parse.
"""

import json
import os
import re
from itertools import accumulate
from typing import Any

from hybrid_moe_ref.files.opening import DamagedFile, open_regular, read_at_most

MAX_JSON_BYTES = 32 << 20
MAX_JSON_DEPTH = 64
MAX_JSON_MEMORY = 128 << 20
"""Limit of the bytes that a parsed JSON file takes in memory. :func:`_parsed_bytes` estimates these bytes."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_A_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_LARGE_NUMBER = re.compile(rb"[eE]\+?0*\d{3}|\d{300}")
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>u[dD][89a-fA-F]..)|.)", re.DOTALL)


def read_json(path: str | os.PathLike[str], most: int = MAX_JSON_BYTES) -> Any:
    """Read the JSON value of a regular file of at most ``most`` bytes.

    Raises DamagedFile with the file, the line if it is known, and what is wrong. Raises OSError if the file cannot be
    read.
    """
    with open_regular(path, most) as file:
        data = read_at_most(file, most + 1)  # one byte more, to notice a file that grows meanwhile
    if len(data) > most:
        raise DamagedFile(f"{os.fspath(path)}:0: larger than {most} bytes")
    return parse_json(data, os.fspath(path))


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON of bounded depth and size. NaN and numbers beyond the range of a float are refused.

    An unpaired surrogate becomes U+FFFD, because it cannot be written to a text file.

    where: the file, for error messages

    Raises DamagedFile if the data is not such JSON.
    """
    if _parsed_bytes(data) > MAX_JSON_MEMORY:
        raise DamagedFile(f"{where}:1: the values would take more than {MAX_JSON_MEMORY >> 20} MiB of memory")
    if _depth(data) > MAX_JSON_DEPTH:
        raise DamagedFile(f"{where}:1: nested too deeply: more than {MAX_JSON_DEPTH} levels")
    if b"\\ud" in data or b"\\uD" in data:
        data = _ESCAPE.sub(lambda match: b"\\ufffd" if match["lone"] else match[0], data)
    # only if needed, because this is slower than json's own parser
    parse_float = _finite if _LARGE_NUMBER.search(data) else None
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=parse_float)
    except json.JSONDecodeError as error:
        raise DamagedFile(f"{where}:{error.lineno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise DamagedFile(f"{where}:1: not UTF-8 text") from None
    except ValueError as error:  # for example, an integer of thousands of digits
        raise DamagedFile(f"{where}:1: {error}") from None


def _parsed_bytes(data: bytes) -> int:
    """Estimate the memory of a parsed JSON text. The estimate is too high if strings contain punctuation.

    A small list or mapping takes up to 250 bytes, a value 64, and a key with its place in the mapping 120.
    """
    containers, values, keys = data.count(b"[") + data.count(b"{"), data.count(b","), data.count(b":")
    return len(data) + 250 * containers + 64 * values + 120 * keys


def _depth(data: bytes) -> int:
    """Return how deeply lists and mappings are nested.

    To save time, return 0 if there are at most MAX_JSON_DEPTH lists and mappings, because the depth is then allowed.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_JSON_DEPTH:
        return 0
    brackets = _STRING.sub(b"", data).translate(None, _NOT_A_BRACKET)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if (value := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is beyond the range of a float")
    return value
