"""The load generator's figures are the server's own, on a load that neither of them feels."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest

from loadgen.targets import truth
from tests.bench import child
from tests.support import require

STREAMS, REQUESTS, TOKENS = 8, 64, 20


@pytest.fixture(params=["c", "python"])
def kind(request: pytest.FixtureRequest) -> truth.Kind:
    """Both servers, held to the same figures."""
    if request.param == "c":
        require(truth.program(), "Linux and a C compiler (cc)")
        return "c"
    return "python"


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_the_report_says_what_the_server_did(
    kind: truth.Kind, tmp_path: Path, endpoint: str
) -> None:
    with truth.serving(kind=kind, ttft_ms=20, itl_ms=5) as server:
        ended, report = child.measure(
            server.url, tmp_path / "runs.db", "--concurrency", str(STREAMS),
            "--requests", str(REQUESTS), "--output-tokens", str(TOKENS), "--input-tokens", "40",
            "--endpoint", endpoint,
        )  # fmt: skip
        true = server.summary(skip=report["run"]["overhead"]["probe_requests"])
    level = report["levels"][0]

    assert true["requests"] == true["finished"] == level["requests"]["ok"] == REQUESTS
    assert true["tokens"] == level["tokens"]["output"] == REQUESTS * TOKENS
    assert true["streams_max"] == STREAMS
    # Generous, because the machine may be busy: what is looked for is a wrong definition, such as
    # the head of the reply taken for its first token, which is off by the whole TTFT.
    assert level["ttft_ms"]["mean"] == pytest.approx(true["ttft_ms"]["mean"], abs=15)
    assert level["itl_ms"]["mean"] == pytest.approx(true["itl_ms"]["mean"], rel=0.1)
    assert level["itl_ms"]["n"] == pytest.approx(true["itl_ms"]["n"], rel=0.1)
    rate = level["output_tokens_per_s"]
    assert rate == pytest.approx(true["tokens_per_s"], rel=0.15)
    assert 0 < ended.cpu_s < ended.wall_s * 2
    assert true["first_request_ns"] > ended.began_ns


def test_replies_that_are_not_streamed(kind: truth.Kind, tmp_path: Path) -> None:
    with truth.serving(kind=kind, ttft_ms=20, itl_ms=1) as server:
        _, report = child.measure(
            server.url, tmp_path / "runs.db", "--rate", "40", "--arrival", "constant",
            "--duration", "1s", "--output-tokens", "4", "--input-tokens", "40", "--no-stream",
        )  # fmt: skip
        skip = report["run"]["overhead"]["probe_requests"]
        true = server.summary(skip=skip, rate=40)
    level = report["levels"][0]
    assert true["requests"] == true["finished"] == level["requests"]["ok"] == 40
    assert level["tokens"]["output"] == true["tokens"] == 160
    assert level["e2e_ms"]["mean"] == pytest.approx(true["reply_ms"]["mean"], abs=15)
    assert true["requests_per_s"] == pytest.approx(40, rel=0.05)


def test_a_stall_shows_in_both(kind: truth.Kind, tmp_path: Path) -> None:
    with truth.serving(kind=kind, ttft_ms=5, itl_ms=5, stall=True) as server:
        _, report = child.measure(
            server.url, tmp_path / "runs.db", "--concurrency", "4", "--requests", "16",
            "--output-tokens", "60", "--input-tokens", "40",
        )  # fmt: skip
        true = server.summary(skip=report["run"]["overhead"]["probe_requests"])
    assert true["itl_ms"]["max"] > 290
    assert report["levels"][0]["itl_ms"]["max"] == pytest.approx(true["itl_ms"]["max"], abs=50)


def test_the_server_forgets(kind: truth.Kind) -> None:
    with truth.serving(kind=kind) as server:
        server.reset()
        assert server.summary()["requests"] == 0
        with pytest.raises(urllib.error.HTTPError):
            server._ask("GET", "/nothing")
