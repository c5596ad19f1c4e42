"""The results of other load generators, as they wrote them of 24 requests over 8 streams.

The server's TTFT was 50 ms, a token came every 10 ms. AIPerf 0.13.0, GuideLLM 0.8.1 and
vllm bench serve 0.32.0; only the members that are read, and their neighbours, are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench import child, peers

GOLDEN = Path(__file__).parent.parent / "golden/peers"


@pytest.mark.parametrize(
    ("name", "ttft_mean", "ttft_p99", "itl_p99", "rate"),
    [
        # Its tokenizer makes two tokens of the word; the bench lets it ask the server.
        ("AIPerf", 53.20, 66.30, 13.03, 1509.6),
        ("GuideLLM", 54.07, 84.82, 10.29, 755.4),
        ("vllm bench serve", 59.42, 91.89, 16.03, 756.9),
    ],
)
def test_their_results_are_read(
    name: str, ttft_mean: float, ttft_p99: float, itl_p99: float, rate: float
) -> None:
    [peer] = [peer for peer in peers.PEERS if peer.name == name]
    told = peer.read(GOLDEN)
    assert told["ttft_ms.mean"] == pytest.approx(ttft_mean, abs=0.01)
    assert told["ttft_ms.p99"] == pytest.approx(ttft_p99, abs=0.01)
    assert told["itl_ms.p99"] == pytest.approx(itl_p99, abs=0.01)
    assert told["output_tokens_per_s"] == pytest.approx(rate, abs=0.1)


def test_they_are_found_where_make_peers_puts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVEFIT_PEERS", str(tmp_path))
    monkeypatch.setenv("SERVEFIT_REAL", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert peers.find() == []
    place = tmp_path / "aiperf/bin"
    place.mkdir(parents=True)
    (place / "aiperf").touch()
    assert peers.find() == []  # without its interpreter it is no environment
    (place / "python").symlink_to(sys.executable)
    [found] = peers.find()
    assert (found.peer.name, found.bin) == ("AIPerf", place)


def test_a_childs_memory_is_that_of_all_its_processes() -> None:
    """Two that hold 100 MB each, longer than the watch looks away.

    No upper bound: the peak that a child has at its beginning is that of whoever tests here.
    """
    hold = "import time; held = b'x' * (100 << 20); time.sleep(2)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}"
    assert child.run([sys.executable, "-c", code]).rss_mb > 200
