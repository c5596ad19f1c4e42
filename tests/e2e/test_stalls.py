"""Stalls, the server's and our own: the first are measured, the second make a level invalid."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadgen.targets import truth
from tests.e2e.command import Started, loadgen
from tests.e2e.together import waiting

STALL_MS = 300  # of every second
ONE_TOKEN = ("--input-tokens", "40", "--output-tokens", "1", "--metrics-url", "none")


@pytest.fixture
def stalling() -> Iterator[truth.Truth]:
    with truth.serving(ttft_ms=5, itl_ms=5, stall=True) as server:
        yield server


def level_of(home: Path, url: str, *options: str) -> dict[str, Any]:
    done = loadgen(home, "run", url, *ONE_TOKEN, *options, "--quiet", "--json", "-")
    assert done.returncode in (0, 3), done.stderr  # 3: the machine was busy; the figures stand
    level: dict[str, Any] = json.loads(done.stdout)["levels"][0]
    return level


def test_an_open_loop_shows_the_servers_stall_and_one_closed_stream_omits_it(
    stalling: truth.Truth, tmp_path: Path
) -> None:
    """Coordinated omission: one stream sends one request into each stall, where 30 % of the users
    that come on their own meet it."""
    on_schedule = level_of(
        tmp_path, stalling.url, "--rate", "100", "--arrival", "constant", "--duration", "5s"
    )
    from_due = on_schedule["ttft_from_due_ms"]
    assert on_schedule["requests"]["ok"] == 500  # none is left out because the server stood still
    # The first in a stall waits for all of it, the last for none: half of it in the mean.
    assert from_due["p99"] == pytest.approx(STALL_MS, abs=60)
    assert from_due["p90"] > 0.5 * STALL_MS
    assert from_due["mean"] > 0.3 * STALL_MS / 2

    closed = level_of(tmp_path, stalling.url, "--concurrency", "1", "--duration", "5s")
    assert closed["ttft_ms"]["max"] == pytest.approx(STALL_MS, abs=60)
    assert closed["ttft_ms"]["p90"] < 0.5 * STALL_MS
    # Five of them met it: of all that fit between, too few for a p90.
    assert closed["requests"]["ok"] > 100


@waiting
@pytest.mark.parametrize(
    "load",
    [
        ("--rate", "300", "--arrival", "constant", "--duration", "6s"),
        ("--rate", "5", "--duration", "6s"),
        ("--concurrency", "8", "--duration", "6s"),
        ("--concurrency", "2", "--duration", "15s"),
    ],
    ids=lambda load: " ".join(load[:2]),
)
def test_a_client_that_was_stopped_for_300_ms_calls_its_level_invalid(
    tmp_path: Path, load: tuple[str, ...]
) -> None:
    result = tmp_path / "out.json"
    with truth.serving(ttft_ms=5, itl_ms=5) as steady:
        running = Started(
            tmp_path, "run", steady.url, *ONE_TOKEN[:2], "--output-tokens", "20",
            "--metrics-url", "none", *load, "--json", str(result),
        )  # fmt: skip
        running.wait_for("running")
        time.sleep(2)
        os.kill(running.process.pid, signal.SIGSTOP)
        time.sleep(0.3)
        os.kill(running.process.pid, signal.SIGCONT)
        code, _, said = running.end()
    assert code == 3, said
    measurement = json.loads(result.read_bytes())["levels"][0]["measurement"]
    assert measurement["valid"] is False
    assert any("stalled_share" in reason for reason in measurement["reasons"])
    assert measurement["loop_lag_ms"]["max"] > 250
    if load[1] == "300":  # those that were due meanwhile went out late, and none was dropped
        assert measurement["send_lag_ms"]["max"] > 250
        assert measurement["send_lag_ms"]["p99"] > 10
