"""Somebody else uses the server while a level runs: the level is invalid, and says how many."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from loadgen.targets.process import started
from tests.e2e.command import SMALL, Started

FOREIGN = 12


def ask(url: str) -> None:
    """One request, as anybody's client sends it."""
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "llama-3.1-8b", "max_tokens": 2, "messages": messages}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.status == 200


def test_a_second_client_makes_the_level_invalid_and_not_the_next(tmp_path: Path) -> None:
    result = tmp_path / "out.json"
    with started("sim:h100-sxm/llama-3.1-8b") as url:
        sweep = Started(
            tmp_path, "sweep", url, *SMALL[:2], "--output-tokens", "64", "--concurrency", "2,3",
            "--duration", "3s", "--json", str(result),
        )  # fmt: skip
        sweep.wait_for("[1/2] 2 streams, simulated: running")
        for _ in range(FOREIGN):
            ask(url)
        code, out, said = sweep.end()
    assert code == 3, said
    disturbed, alone = json.loads(result.read_bytes())["levels"]
    measured = disturbed["measurement"]
    assert measured["valid"] is False
    assert measured["foreign_requests"] == FOREIGN
    [reason] = [why for why in measured["reasons"] if why.startswith("foreign_traffic")]
    assert f"finished {FOREIGN} requests that were not ours, above the bound of 1% of" in reason
    assert alone["measurement"]["foreign_requests"] == 0
    assert "not valid, 2 streams: " in out
