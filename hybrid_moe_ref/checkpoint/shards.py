"""The tensors of a checkpoint folder, read a few rows at a time.

A safetensors file is eight bytes of header length, a JSON header, and raw little-endian tensors. It is read here with
plain seeks: a mapped file would count into the process's memory page by page, and a wrong size should name the file,
the tensor and both numbers.
"""

import json
import math
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_moe_ref.checkpoint.errors import CheckpointError
from hybrid_moe_ref.slices import Range

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
MAX_JSON_BYTES = 100_000_000
BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Shards:
    """All tensors of a folder by name. The headers are read at once, the data on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._entries: dict[str, Entry] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        problems: list[str] = []
        if (folder / INDEX).exists():
            self._read_index(problems)
        elif (folder / SINGLE).exists():
            self._entries = _header(folder / SINGLE, problems)
        else:
            problems.append(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        if problems:
            raise CheckpointError(problems)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    @property
    def names(self) -> set[str]:
        return set(self._entries)

    def rows(
        self, name: str, index: int | None = None, ranges: Iterable[Range] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """A tensor on the CPU, or only its row `index`, some rows at a time: the number of the first row and a block of
        at most BLOCK_BYTES, or one row. Only the rows in `ranges` are read, in that order. Each block is gone with the
        next one: all lie in one buffer, as an allocator that is given back block after block keeps several of them."""
        entry = self._entries[name]
        shape, start, size = entry.shape, entry.start, entry.end - entry.start
        if index is not None:
            size //= shape[0]
            shape, start = shape[1:], start + index * size
        row_bytes = size // max(1, shape[0])
        at_once = max(1, BLOCK_BYTES // max(1, row_bytes))
        with entry.file.open("rb", buffering=0) as file:
            for first, stop in [(0, shape[0])] if ranges is None else ranges:
                file.seek(start + first * row_bytes)
                for row in range(first, stop, at_once):
                    count = min(at_once, stop - row)
                    if (needed := count * row_bytes) > len(self._buffer):
                        self._buffer = torch.empty(max(needed, BLOCK_BYTES), dtype=torch.uint8)
                    raw = self._buffer[:needed]
                    self._fill(raw.numpy().data, file, f"{entry.file}: {name}")
                    self.bytes_read += len(raw)
                    yield row, raw.view(entry.dtype).view(count, *shape[1:])

    def read(self, name: str, index: int | None = None) -> Tensor:
        """All rows together."""
        return torch.cat([block.clone() for _, block in self.rows(name, index)])

    def _fill(self, view: memoryview, file: FileIO, what: str) -> None:
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{what}: the file ends {len(view)} bytes too early")
            view = view[count:]

    def _read_index(self, problems: list[str]) -> None:
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: weight_map is not a mapping of tensor names to files")
        files: dict[str, dict[str, Entry]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                problems.append(f"{path}: {name}: {file!r} is not the plain name of a file in this folder")
            elif file not in files:
                if (self.folder / file).is_file():
                    files[file] = _header(self.folder / file, problems)
                else:
                    files[file] = {}
                    problems.append(f"{path}: {name}: there is no file {file!r}")
        if problems:
            return
        for name, file in weight_map.items():
            if name in files[file]:
                self._entries[name] = files[file][name]
            else:
                problems.append(f"{path}: {name}: not in {file!r}, where the index says it is")
        for file, entries in files.items():
            for name in entries:
                if name not in weight_map:
                    problems.append(f"{self.folder / file}: {name}: not in the index")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if (size := status.st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, more than the {MAX_JSON_BYTES} that are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _header(path: Path, problems: list[str]) -> dict[str, Entry]:
    """The entries of one file; what does not fit is added to `problems`."""
    if not path.is_file():  # a pipe would be waited for
        problems.append(f"{path}: not a regular file")
        return {}
    with path.open("rb") as file:
        file_size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or length > min(file_size - 8, MAX_JSON_BYTES):
            problems.append(f"{path}: truncated or corrupt: {file_size} bytes for a header of {length}")
            return {}
        try:
            header = json.loads(file.read(length))
            assert isinstance(header, dict)
        except (ValueError, RecursionError, AssertionError):
            problems.append(f"{path}: corrupt: the header of {length} bytes is not a JSON object")
            return {}
    entries = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype_name, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
            if type(dtype_name) is not str or not all(type(x) is int and x >= 0 for x in (start, end, *shape)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            problems.append(f"{path}: {name}: corrupt header entry")
            continue
        if dtype_name not in DTYPES:
            problems.append(f"{path}: {name}: dtype {dtype_name!r} is not one of {', '.join(DTYPES)}")
            continue
        needed = math.prod(shape) * DTYPES[dtype_name].itemsize
        if needed != end - start:
            problems.append(f"{path}: {name}: shape {shape} needs {needed} bytes, the header gives it {end - start}")
        elif 8 + length + end > file_size:
            problems.append(f"{path}: {name}: truncated: ends at byte {8 + length + end}, the file has {file_size}")
        else:
            offset = 8 + length
            entries[name] = Entry(path, DTYPES[dtype_name], tuple(shape), offset + start, offset + end)
    if not problems:
        problems += _gaps(path, entries, 8 + length, file_size)
    return entries


def _gaps(path: Path, entries: dict[str, Entry], start: int, file_size: int) -> Iterator[str]:
    """Tensors follow one another from the header to the end of the file, as the format demands."""
    before = "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != start:
            how = "overlaps" if entry.start < start else "leaves a gap after"
            yield f"{path}: {name}: corrupt: begins at byte {entry.start} and {how} {before}, which ends at {start}"
        start, before = max(start, entry.end), name
    if start != file_size:
        yield f"{path}: corrupt: the tensors end at byte {start}, the file has {file_size}"
