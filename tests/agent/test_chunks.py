"""Chunks give back what was put in, whatever it is, and are small where readings usually are."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.chunks import pack, unpack

TIMES = st.integers(-(2**62), 2**62)
ANY = st.floats() | st.integers(-1000, 1000).map(lambda n: n / 100)


@given(st.lists(st.tuples(TIMES, ANY), min_size=1, max_size=200))
def test_what_was_packed_comes_back(points: list[tuple[int, float]]) -> None:
    times, values = unpack(pack(*zip(*points, strict=True)))
    assert times.tolist() == [at for at, _ in points]
    for back, (_, value) in zip(values.tolist(), points, strict=True):
        assert back == value or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize(
    ("series", "bytes_per_point"),
    [
        (lambda dice, n: 80e9, 0.1),  # memory that never changes
        (lambda dice, n: dice.randint(55, 60), 1.0),  # temperature
        (lambda dice, n: dice.randint(0, 100) / 100, 1.8),  # utilization
        (lambda dice, n: round(dice.gauss(400, 20), 3), 2.9),  # power, to the milliwatt
        (lambda dice, n: dice.random(), 8.2),  # noise to the last bit
    ],
)
def test_a_usual_series_is_small(series: object, bytes_per_point: float) -> None:
    assert callable(series)
    dice = random.Random(1)
    times = [1_760_000_000_000 + 1000 * n + dice.randint(0, 3) for n in range(600)]
    size = len(pack(times, [series(dice, n) for n in range(600)])) / 600
    assert size - 0.45 <= bytes_per_point  # the jitter of the stamps, and the head


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"chunk|cannot reshape"):
        unpack(data)


def test_a_chunk_that_lost_its_end_is_refused() -> None:
    data = pack(list(range(100)), [random.Random(n).random() for n in range(100)])
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"."):
            unpack(data[:end])
