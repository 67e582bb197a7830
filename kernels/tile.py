"""Shared parts of the Triton kernels: device checks, the tiles of a ragged batch, and products of tiles.

In a ragged batch the rows of B sequences follow one another; sequence b has the rows start[b] to start[b + 1]. A grid
must not depend on lengths that only the device knows, because a CUDA graph replays it for other lengths. So the grid
has `num_tiles` Triton programs (a program is one instance of a kernel), which always suffice. A program finds its tile
by `locate`; some programs have no tile.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = (
    triton.knobs.runtime.interpret
)  # whether TRITON_INTERPRET was set when this file was imported: the kernels are made then
ROUNDS = tl.constexpr(INTERPRETED)
DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ("cuda", "cpu")  # on a CPU, `missing` names a reason unless the interpreter is on

Config = dict[str, int]
_forced: dict[str, Config] = {}


@functools.cache
def missing() -> str:
    """Return what Triton lacks to run a kernel on this machine; "" if nothing."""
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET=1 was not set before the start"
    try:
        triton.runtime.driver.active.get_current_target()  # its C part is compiled on first use
    except Exception as error:  # no compiler, no Python headers, no driver: each has its own type
        return f"its driver does not work ({error})"
    return ""


def config(kernel: str, default: Config) -> Config:
    """Return the sizes with which to launch a kernel: those that `forcing` sets for the kernel, otherwise `default`.

    The default must depend on shapes only. There is no autotuning at launch: its choice would differ between ranks, a
    rank that tunes would make its peers wait in a collective, and kernels that update states in place would run several
    times.
    """
    return _forced.get(kernel, default)


@contextlib.contextmanager
def forcing(kernel: str, chosen: Config) -> Iterator[None]:
    """Launch the kernel with these sizes inside the ``with``, to compare them in a benchmark."""
    _forced[kernel] = chosen
    try:
        yield
    finally:
        del _forced[kernel]


@functools.cache
def _counters(device: torch.device, size: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a decode step must run once on the device before one is captured in a graph: run a step first"
        )
    return torch.zeros(size, dtype=torch.int32, device=device)


def arrival_counters(device: torch.device, count: int) -> Tensor:
    """Return at least `count` counters that are zero. A kernel that uses them resets them to zero.

    They are never freed, because captured graphs hold their address.

    Kernels that share counters must not run at the same time, so two decode steps on one device must use one stream.
    Raises RuntimeError if the counters do not exist yet when a CUDA graph is captured, because the capture would only
    record that they are set to zero.
    """
    return _counters(device, max(1024, triton.next_power_of_2(count)))


def num_tiles(num_rows: int, num_sequences: int, tile: int) -> int:
    """Return a number of tiles that suffices for any split of the rows into sequences; no tile spans two sequences."""
    return num_rows // tile + num_sequences


@triton.jit
def locate(tile, start_ptr, num_sequences, TILE: tl.constexpr):
    """Return (sequence b, the first row of b, the number of rows of b, the tile's first row within b).

    The tiles of sequence b have the numbers from start[b] // TILE + b on. There are ceil(length / TILE) of them. They
    end before the tiles of sequence b + 1 begin, because floor(x) + ceil(y) <= floor(x + y) + 1. So no sum over the
    other sequences is needed. If a Triton program has no tile, the fourth number is at least as large as the third, so
    the program can see that it has no rows.
    """
    low = tile * 0
    high = low + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(start_ptr + middle) // TILE + middle <= tile:
            low = middle
        else:
            high = middle
    first = tl.load(start_ptr + low)
    length = (tl.load(start_ptr + low + 1) - first).to(tl.int32)
    return low, first, length, ((tile - low - first // TILE) * TILE).to(tl.int32)


@triton.jit
def product(a, b, KIND: tl.constexpr):
    """Return a @ b in float32. KIND says how many bits of a and of b are kept, and so how fast this is on a GPU:

    "bf16"    8 bits of a and 8 of b; this is exact if both are bfloat16
    "f16"     11 bits of a and 11 of b; as fast as "bf16", but numbers must stay below 65,504
    "f16x2"   11 bits of a, which must be float16, and 22 of b; half as fast, because it is two products
    "bf16x2"  8 bits of the operand that is bfloat16, and 16 of the other one; half as fast, because it is two products
    "tf32x3"  22 bits of a and 22 of b; a sixth as fast
    """
    if KIND == "tf32x3":
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    elif KIND == "f16":
        c = tl.dot(a.to(tl.float16), b.to(tl.float16))
    elif KIND == "f16x2":
        high = b.to(tl.float16)
        c = tl.dot(a, (b - high.to(tl.float32)).to(tl.float16)) + tl.dot(a, high)
    elif KIND == "bf16x2" and b.dtype == tl.bfloat16:
        high = cast(a, tl.bfloat16)
        c = _product_bf16(cast(a - high.to(tl.float32), tl.bfloat16), b) + _product_bf16(high, b)
    elif KIND == "bf16x2":
        high = cast(b, tl.bfloat16)
        c = _product_bf16(a, cast(b - high.to(tl.float32), tl.bfloat16)) + _product_bf16(a, high)
    else:
        c = _product_bf16(a, b)
    return c


@triton.jit
def _product_bf16(a, b):
    a, b = cast(a, tl.bfloat16), cast(b, tl.bfloat16)
    if ROUNDS:  # the interpreter computes products of bfloat16 wrong
        c = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        c = tl.dot(a, b)
    return c


@triton.jit
def _round(x, num_bits: tl.constexpr):
    """Round a float32 to fewer bits, to the nearest, ties to even; tensor cores and casts can truncate instead."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + (2 ** (num_bits - 1) - 1) + ((bits >> num_bits) & 1)) & -(2**num_bits)
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Return x.to(dtype), rounded to the nearest also in the interpreter, whose own cast to bfloat16 truncates."""
    if ROUNDS and dtype == tl.bfloat16:
        x = _round(x.to(tl.float32), 16)
    return x.to(dtype)


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Return log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|, with a relative error of about 1e-7.

    The device's logarithm has a large relative error near 1. So log(1 + u) is computed as 2 artanh(s), with
    s = u / (2 + u) <= 1/3.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2 + u)
    r = s * s
    series = 1.0 / 17 + r * (1.0 / 19)
    for step in tl.static_range(8):
        series = 1.0 / (15 - 2 * step) + r * series
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def convolve(x_at, past_at, weight_at, bias_at, channel, is_in, past_row, W: tl.constexpr):
    """Return the silu of a causal convolution of width W at the newest input, for a vector of channels.

    past_at points to the W - 1 inputs before the newest one, with one input per row. bias_at is None if there is no
    bias.
    """
    y = tl.load(x_at + channel, is_in, 0.0).to(tl.float32)
    y *= tl.load(weight_at + channel * W + W - 1, is_in, 0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        past = tl.load(past_at + w * past_row + channel, is_in, 0.0).to(tl.float32)
        y += past * tl.load(weight_at + channel * W + w, is_in, 0.0).to(tl.float32)
    if bias_at is not None:
        y += tl.load(bias_at + channel, is_in, 0.0).to(tl.float32)
    return silu(y)


@triton.jit
def shift(x_at, past_at, channel, is_in, past_row, W: tl.constexpr):
    """Update the convolution's state: drop the oldest of the W - 1 inputs and append the newest.

    One thread reads and writes all values of a channel, so no value is overwritten before it is read.
    """
    for w in tl.static_range(W - 2):
        tl.store(past_at + w * past_row + channel, tl.load(past_at + (w + 1) * past_row + channel, is_in), is_in)
    if W > 1:
        tl.store(past_at + (W - 2) * past_row + channel, tl.load(x_at + channel, is_in), is_in)
