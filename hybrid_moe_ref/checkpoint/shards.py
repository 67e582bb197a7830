"""Read the tensors of a checkpoint folder, a few rows at a time, with the safetensors library.

The library maps the files into memory. So only the requested rows are read, and the operating system can drop them
from memory again. The library also checks the header of each file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybrid_moe_ref.checkpoint.errors import CheckpointError
from hybrid_moe_ref.files import DamagedFile
from hybrid_moe_ref.files import read_json as read_any_json
from hybrid_moe_ref.slices import Range

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT8 = "F8_E4M3"
WEIGHTS = ("F64", "F32", "F16", "BF16", FLOAT8)
"""Dtypes of weights, by their names in the files."""

SCALES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
"""Dtypes of the scales of float8 blocks."""

MAX_JSON_BYTES = 100_000_000
BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class Entry:
    """The file of a tensor, its dtype as safetensors names it (such as "BF16"), and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """All tensors of a folder, by name. The constructor reads the headers; data is read on demand.

    Raises CheckpointError with every problem of the folder's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._entries: dict[str, Entry] = {}
        self._files: dict[Path, Any] = {}
        problems: list[str] = []
        if (folder / INDEX).exists():
            self._read_index(problems)
        elif (folder / SINGLE).exists():
            self._entries = self._open(folder / SINGLE, problems)
        else:
            problems.append(f"{folder}: the folder has neither {SINGLE} nor {INDEX}")
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
        """Yield a tensor in blocks of rows on the CPU, each as (index of the block's first row, block).

        index    yield `tensor[index]` instead of the tensor, such as one expert of a layer
        ranges   yield only the rows in these ranges, in this order

        A block has at most BLOCK_BYTES, or one row if a row is larger. Blocks are views of the file: do not write to
        them.
        """
        entry = self._entries[name]
        data = self._files[entry.file].get_slice(name)
        shape = entry.shape if index is None else entry.shape[1:]
        for first, stop in [(0, shape[0])] if ranges is None else ranges:
            row = first
            while row < stop:
                one: Tensor = data[row : row + 1] if index is None else data[index, row : row + 1]
                count = min(stop - row, max(1, BLOCK_BYTES // max(1, one.nbytes)))
                block: Tensor = data[row : row + count] if index is None else data[index, row : row + count]
                self.bytes_read += block.nbytes
                yield row, block
                row += count

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor; with `index`, only `tensor[index]`."""
        return torch.cat([block for _, block in self.rows(name, index)])

    def _open(self, path: Path, problems: list[str]) -> dict[str, Entry]:
        """Read the header of one file. Returns its tensors by name, and appends its problems to `problems`."""
        if not path.is_file():  # opening a pipe would wait for its writer
            problems.append(f"{path}: not a regular file")
            return {}
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).removeprefix("Error while deserializing header: ").split())
            what = f"truncated, corrupt or not a safetensors file ({path.stat().st_size} bytes)"
            problems.append(f"{path}: {what}: {reason:.200}")
            return {}
        self._files[path] = file
        entries = {}
        for name in file.keys():  # noqa: SIM118  # it is not iterable
            data = file.get_slice(name)
            entries[name] = Entry(path, data.get_dtype(), tuple(data.get_shape()))
        return entries

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
                    files[file] = self._open(self.folder / file, problems)
                else:
                    files[file] = {}
                    problems.append(f"{path}: {name}: there is no file {file!r}")
        if problems:
            return
        for name, file in weight_map.items():
            if name in files[file]:
                self._entries[name] = files[file][name]
            else:
                problems.append(f"{path}: {name}: the tensor is not in {file!r}, where the index says it is")
        for file, entries in files.items():
            for name in entries:
                if name not in weight_map:
                    problems.append(f"{self.folder / file}: {name}: the tensor is not in the index")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most MAX_JSON_BYTES.

    Raises CheckpointError if the file cannot be read, is not a regular file, is larger, or is not one JSON object.
    """
    try:
        value = read_any_json(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except DamagedFile as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value
