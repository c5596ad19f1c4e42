"""Points of one series in few bytes, without loss: what ten minutes of raw readings are kept as.

Most readings are decimals of few digits (0.37, 61 °C, 412.519 W) that change little from one to
the next. As whole steps of the smallest decimal, differences of neighbours, and bytes of equal
weight side by side, they deflate to one or two bytes a point; other numbers take eight at most.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
Values = NDArray[np.float64]

_HEADER = struct.Struct("<BBBBIqq")  # version, digits, widths of both columns, n, first of both
_VERSION = 1
_DIGITS_MAX = 6
_AS_BITS = 255  # in place of digits: the numbers are no short decimals, their bits are kept
_EXACT = 2**53  # up to here a float holds every whole number
_LEVEL = 6


def pack(times_ms: Sequence[int] | Times, values: Sequence[float] | Values) -> bytes:
    """Points in the order given, which need not be that of time. Needs one point at least.

    NaN and infinities are kept as they are; −0 comes back as 0.
    """
    times = np.asarray(times_ms, dtype=np.int64)
    digits, whole = _as_whole_numbers(np.asarray(values, dtype=np.float64))
    widths, columns = zip(*(_differences(column) for column in (times, whole)), strict=True)
    head = _HEADER.pack(_VERSION, digits, *widths, times.size, int(times[0]), int(whole[0]))
    return head + zlib.compress(b"".join(columns), _LEVEL)


def unpack(data: bytes) -> tuple[Times, Values]:
    """What was packed. Raises ValueError for bytes that `pack` did not write."""
    try:
        version, digits, time_width, value_width, n, time_0, value_0 = _HEADER.unpack_from(data)
        columns = zlib.decompress(data[_HEADER.size :])
        if version != _VERSION:
            raise ValueError(f"a chunk of version {version}")
        end = (n - 1) * time_width
        times = _sums(columns[:end], time_width, time_0)
        whole = _sums(columns[end:], value_width, value_0)
    except (struct.error, zlib.error, TypeError) as error:
        raise ValueError(f"not a chunk: {error}") from error
    if times.size != n or whole.size != n:
        raise ValueError(f"a chunk of {n} points holds {times.size} times, {whole.size} values")
    return times, whole.view(np.float64) if digits == _AS_BITS else whole / 10.0**digits


def _as_whole_numbers(values: Values) -> tuple[int, NDArray[np.int64]]:
    """Values times the least power of ten that makes all of them whole, else their bits."""
    if np.isfinite(values).all():
        for digits in range(_DIGITS_MAX + 1):
            scaled = np.rint(values * 10.0**digits)
            if np.abs(scaled).max() >= _EXACT:
                break
            if (scaled / 10.0**digits == values).all():
                return digits, scaled.astype(np.int64)
    return _AS_BITS, values.view(np.int64)


def _differences(column: NDArray[np.int64]) -> tuple[int, bytes]:
    """Differences of neighbours in the narrowest width that holds them, byte by byte apart."""
    steps = np.diff(column)  # wraps around, and so does the sum that undoes it
    zigzag = (steps << 1) ^ (steps >> 63)  # small whatever the sign
    unsigned = zigzag.view(np.uint64)
    most = int(unsigned.max()) if unsigned.size else 0
    width = next(width for width in (1, 2, 4, 8) if most < 1 << (8 * width))
    narrow = unsigned.astype(f"<u{width}")
    return width, narrow.view(np.uint8).reshape(-1, width).T.tobytes()


def _sums(data: bytes, width: int, first: int) -> NDArray[np.int64]:
    narrow = np.frombuffer(data, np.uint8).reshape(width, -1).T.copy().view(f"<u{width}").ravel()
    unsigned = narrow.astype(np.uint64)
    zigzag = unsigned.view(np.int64)
    steps = (unsigned >> np.uint64(1)).view(np.int64) ^ -(zigzag & 1)
    return np.cumsum(np.concatenate((np.array([first], np.int64), steps)), dtype=np.int64)
