"""Requests from the store's rows to columns, and what is worked out of them."""

from __future__ import annotations

import numpy as np
import pytest

from agent.model import Slo
from loadgen.kept import arrivals, by_level, kept, meets, pooled_gaps
from tests.loadgen.levels import row


def test_columns_of_an_answer_and_of_one_that_was_never_sent() -> None:
    never = {"level": 0, "request": 1, "due_ms": 7.0, "error": "connect", "end_ms": 9.0}
    requests = kept([row(0, 100.0, 20.0, [5.0, 7.0], connect_ms=3.0, end_ms=133.0), never])
    assert requests.start_ms[0] == 97.0
    assert requests.first_ms[0] == 120.0
    assert requests.last_ms[0] == 132.0
    assert requests.end_ms.tolist() == [133.0, 9.0]
    assert requests.tpot_ms[0] == 6.0
    assert np.isnan([requests.start_ms[1], requests.ttft_ms[1], requests.output_tokens[1]]).all()
    assert requests.ok.tolist() == [True, False]
    assert requests.failed.tolist() == [False, True]
    assert requests.gaps_ms[1] is None
    assert requests.where(requests.ok).error == (None,)


def test_rows_of_an_older_store_know_less() -> None:
    old = {"level": 0, "request": 0, "due_ms": 0.0, "sent_ms": 1.0, "ttft_ms": 2.0, "e2e_ms": 12.0,
           "prompt_tokens": 3, "output_tokens": 6, "error": None, "gaps_ms": None, "end_ms": None,
           "connect_ms": None, "chunks": None}  # fmt: skip
    requests = kept([old])
    assert requests.start_ms[0] == 1.0
    assert requests.end_ms[0] == requests.last_ms[0] == 13.0
    at, tokens = arrivals(requests)  # a token a chunk, evenly
    assert at.tolist() == [3.0, 5.0, 7.0, 9.0, 11.0, 13.0]
    assert tokens.tolist() == [1.0] * 6


def test_tokens_arrive_with_their_chunks() -> None:
    streamed = row(0, 10.0, 5.0, [4.0], output_tokens=6)
    whole = row(1, 10.0, 5.0, [], ttft_ms=None, e2e_ms=30.0, end_ms=40.0, output_tokens=4)
    at, tokens = arrivals(kept([streamed, whole]))
    assert dict(zip(at.tolist(), tokens.tolist(), strict=True)) == {15.0: 3.0, 19.0: 3.0, 40.0: 4.0}


def test_gaps_know_their_request() -> None:
    gaps, owner = pooled_gaps(kept([row(0, 0, 1, [2, 3]), row(1, 0, 1, []), row(2, 0, 1, [4])]))
    assert gaps.tolist() == [2, 3, 4]
    assert owner.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo("ttft", "p95", 15.0), [True, False, False]),
        (Slo("tpot", "mean", 6.0), [True, True, False]),
        (Slo("e2e", "p99", 29.0), [True, False, False]),
        (Slo("itl", "max", 5.5), [False, True, False]),
        (Slo("itl", "mean", 5.5), [True, True, False]),
        (Slo("ttfo", "p50", 15.0), [True, False, False]),
    ],
)
def test_meeting_an_slo(slo: Slo, met: list[bool]) -> None:
    failed = row(2, 0, 1, [1], error="timeout")
    requests = kept([row(0, 0, 10, [4, 6]), row(1, 0, 20, [5, 5]), failed])
    assert meets(requests, [slo]).tolist() == met


def test_levels_keep_their_own_rows() -> None:
    first, third = by_level([row(0, 0, 1, []), row(0, 0, 1, [], level=2)], 3)[::2]
    assert (first.n, third.n) == (1, 1)
