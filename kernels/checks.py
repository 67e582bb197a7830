"""Check the arguments of the ops. An error names the argument, its value and the required value.

This is the only check of shapes, dtypes, devices, strides and indices; implementations do not repeat it.

The name of an argument ends in its shape, with a letter for each dimension: `k_TMK` is [T, M, K]. A letter stands for
the same number in every argument of a call.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Inside:
    """Counts the ``with`` blocks of one kind that are running now, in all threads. Blocks can overlap."""

    def __init__(self) -> None:
        self.count, self._lock = 0, threading.Lock()

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        with self._lock:
            self.count += 1
        try:
            yield
        finally:
            with self._lock:
                self.count -= 1


_known = Inside()


@contextlib.contextmanager
def values_known() -> Iterator[None]:
    """Inside the ``with``, do not check the values of index tensors on a GPU.

    To read these values, the host would have to wait for the GPU in every layer. Use this if the host has computed the
    values itself. Shapes, dtypes and strides are still checked.
    """
    with _known.block():
        yield


def can_read_values(x: Tensor) -> bool:
    """Return whether the caller is allowed to read the values of `x` now: always if `x` is on a CPU.

    If `x` is on a GPU, the host must wait for the GPU to read them. So the result is False inside `values_known`, and
    while a CUDA graph is captured.
    """
    return x.device.type == "cpu" or (not _known.count and not torch.cuda.is_current_stream_capturing())


class Sizes:
    """Remembers the size of each letter in one call ("T" -> 128). Each checked argument adds its new letters.

    device    the device that every argument must be on
    known     sizes that are known before the first argument, by letter
    """

    def __init__(self, device: torch.device, **known: int) -> None:
        self.device, self.known = device, known

    def take(self, name: str, x: Tensor, *dtypes: torch.dtype, dense: int = 1) -> None:
        """Check one argument against the letters at the end of its name: `k_TMK` must have the shape [T, M, K].

        dtypes    the dtypes that the argument is allowed to have
        dense     how many of the last dimensions must be contiguous

        Raises ValueError.
        """
        letters, shape, known = name.rpartition("_")[2], x.shape, self.known
        fits = len(shape) == len(letters)
        for letter, size in zip(letters, shape, strict=False):
            fits = fits and known.get(letter, size) == size
        if not fits:
            text = ", ".join(f"{letter} = {known[letter]}" if letter in known else letter for letter in letters)
            raise ValueError(f"{name}: the shape is {list(shape)}, but must be [{text}]")
        known.update(zip(letters, shape, strict=True))
        if x.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name}: the dtype is {str(x.dtype).removeprefix('torch.')}, but must be {names}")
        if x.device != self.device:
            raise ValueError(f"{name}: the device is {x.device}, but must be {self.device}")
        if not x.is_contiguous():
            self._last_contiguous(name, x, dense)

    def _last_contiguous(self, name: str, x: Tensor, dense: int) -> None:
        step = 1
        for stride, size in zip(reversed(x.stride()[-dense:] if dense else ()), reversed(x.shape), strict=False):
            if size > 1 and stride != step and x.numel():
                raise ValueError(
                    f"{name}: the strides are {list(x.stride())}, but the last {dense} dimensions must be contiguous"
                )
            step *= size

    def multiple(self, letter: str, of: str) -> None:
        """Check that the size `letter` is a multiple of the size `of`. Raises ValueError."""
        number, divisor = self.known[letter], self.known[of]
        if divisor == 0 or number % divisor:
            raise ValueError(f"{letter}: the size is {number}, but must be a multiple of {of} = {divisor}")


def slots(name: str, slots_B: Tensor, num_slots: int) -> None:
    """Check indices into a pool of states: each must be in range, and none is allowed to appear twice.

    If `can_read_values` is False, check nothing. Otherwise, if the tensor is on a GPU, the host waits for the GPU.
    Raises ValueError.
    """
    if not can_read_values(slots_B):
        return
    values = slots_B.tolist()
    for value in values:
        if not 0 <= value < num_slots:
            raise ValueError(f"{name}: an index is {value}, but must be from 0 to {num_slots - 1}")
    if len(set(values)) != len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"{name}: index {twice} appears {values.count(twice)} times, but must appear once")


def cu_seqlens(name: str, cu_seqlens_X: Tensor, num_sequences: int, num_tokens: int) -> None:
    """Check B + 1 numbers that begin with 0 and never decrease: the first row of each of B sequences, then num_tokens.

    If `can_read_values` is False, check only the shape. Otherwise, if the tensor is on a GPU, the host waits for the
    GPU. Raises ValueError.
    """
    if cu_seqlens_X.shape != (num_sequences + 1,):
        raise ValueError(f"{name}: the shape is {list(cu_seqlens_X.shape)}, but must be [X = {num_sequences + 1}]")
    if not can_read_values(cu_seqlens_X):
        return
    values = cu_seqlens_X.tolist()
    if values[0] != 0 or values[-1] != num_tokens:
        raise ValueError(f"{name}: the numbers go from {values[0]} to {values[-1]}, but must go from 0 to {num_tokens}")
    for before, after in itertools.pairwise(values):
        if after < before:
            raise ValueError(f"{name}: {after} comes after {before}, but the numbers must not decrease")
