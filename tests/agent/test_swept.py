"""Curves that other tools wrote: read with what they leave out, refused where they cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Sweep, UsageError, encode
from agent.swept import read_sweep

LEVEL = {"concurrency": 4, "output_tokens_per_s": 100.0}


def read(*levels: Any, **more: Any) -> Sweep:
    return read_sweep(json.dumps({"levels": list(levels), **more}).encode())


def test_nulls_are_what_is_not_known() -> None:
    none = dict.fromkeys(("ttft_ms", "itl_ms", "gpu", "server", "mode", "prompt_tokens"))
    found = read({**LEVEL, **none}, run=None, verdict=None, workload={"input_tokens": None},
                 target={"gpus": [{"name": "L4", "uuid": None}, {"name": "L4"}]})  # fmt: skip
    assert found.levels == read(LEVEL).levels
    assert [one.uuid for one in found.target.gpus] == ["", ""]


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert read({**LEVEL, "concurrency": 4.0}).levels[0].concurrency == 4


@given(st.integers(1, 10**9), st.floats(0, 1e12))
def test_what_is_written_here_is_read_here(streams: int, rate: float) -> None:
    sweep = read({"concurrency": streams, "output_tokens_per_s": rate})
    assert read_sweep(encode(sweep)) == sweep


@pytest.mark.parametrize(
    ("level", "wrong"),
    [
        ({**LEVEL, "concurrency": 0}, "levels[0]: concurrency is 0"),
        ({**LEVEL, "concurrency": 10**12}, "concurrency is 1e+12"),
        ({**LEVEL, "concurrency": 4.5}, "Expected `int"),
        ({**LEVEL, "output_tokens_per_s": -1}, "output_tokens_per_s is -1"),
        ({"output_tokens_per_s": 5}, "it tells no load"),
        ({**LEVEL, "ttft_ms": {"mean": -5}}, "ttft_ms.mean is -5"),
        ({"mode": "rate", "offered_rps": 0, "request_throughput": 1}, "offered_rps is 0"),
        ("x", "Expected `object`"),
    ],
)
def test_what_no_server_shows_is_refused(level: object, wrong: str) -> None:
    with pytest.raises(UsageError) as error:
        read(level)
    assert wrong in str(error.value)


@pytest.mark.parametrize("version", [0, 2])
def test_another_version_is_told(version: int) -> None:
    with pytest.raises(UsageError, match=f"schema_version {version}, and this reads 1"):
        read(LEVEL, schema_version=version)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"levels": "x"}', b"\xff\xfe"])
def test_what_is_no_sweep(data: bytes) -> None:
    with pytest.raises(UsageError, match="not a sweep"):
        read_sweep(data)
