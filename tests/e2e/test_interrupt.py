"""Ctrl-C and SIGTERM: what was measured is kept and reported, and nobody has to wait."""

from __future__ import annotations

import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from agent.store import Store
from tests.e2e.command import SMALL, Started, the_line
from tests.e2e.misbehaving import MODEL, Writer, good, message, serving, silence

SLOW = partial(good, tokens=20, pause_s=0.02)  # a reply takes 0.4 s: some are always in flight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_a_level_it_keeps_the_finished_one_and_the_part(
    tmp_path: Path, number: signal.Signals
) -> None:
    result, database = tmp_path / "out.json", tmp_path / "runs.db"
    with serving(SLOW) as address:
        running = Started(
            tmp_path, "sweep", f"http://{address}", *SMALL, "--concurrency", "1,3,2",
            "--duration", "2s", "--json", str(result), "--db", str(database),
        )  # fmt: skip
        running.wait_for("[2/3] 3 streams: running")
        time.sleep(0.8)
        running.process.send_signal(number)
        code, out, said = running.end()
    assert code == 130, said
    assert "interrupted: keeping what was measured" in said
    assert "[3/3]" not in said
    assert "streams" in out  # the closing table of what there is
    sweep = json.loads(result.read_bytes())
    finished, part = sweep["levels"]
    assert sweep["run"]["interrupted"] is True
    assert finished["requests"]["cancelled"] == 0
    assert finished["requests"]["ok"] > 0
    assert part["requests"]["cancelled"] == 3
    assert part["requests"]["failed"] == 0
    with Store(database) as store:
        [run] = store.runs()
        assert (run["levels"], run["interrupted"]) == (2, 1)
        kept = [row for row in store.requests(run["id"]) if row["level"] == 1]
    assert sum(row["error"] == "cancelled" for row in kept) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_probes_there_is_nothing_to_keep(tmp_path: Path, number: signal.Signals) -> None:
    with serving(probe=silence) as address:
        running = Started(tmp_path, "sweep", f"http://{address}", *SMALL, "--concurrency", "1")
        running.wait_for("note: no server data")  # said just before the first probe
        time.sleep(0.3)
        running.process.send_signal(number)
        code, out, said = running.end(timeout_s=20)
    assert code == 130
    assert the_line(said) == "interrupted"
    assert out == ""


def test_while_the_simulated_server_starts(tmp_path: Path) -> None:
    running = Started(tmp_path, "sweep", "sim:h100-sxm/llama-3.1-8b", *SMALL)
    time.sleep(0.7)
    running.process.send_signal(signal.SIGTERM)
    code, _, said = running.end(timeout_s=20)
    assert code in (130, -signal.SIGTERM), said  # the latter before Python could listen


def test_between_two_levels_the_finished_one_is_kept(tmp_path: Path) -> None:
    """A server that counts slowly holds the sweep after a level: nothing of it may be lost."""
    page = (
        f'vllm:num_requests_running{{model_name="{MODEL}"}} 0\n'
        f'vllm:num_requests_waiting{{model_name="{MODEL}"}} 0\n'
        f'vllm:request_success_total{{model_name="{MODEL}",finished_reason="stop"}} 0\n'
    )
    metrics = message(200, page.encode(), "text/plain; version=0.0.4")
    result = tmp_path / "out.json"
    with serving(good, pages={"/metrics": metrics}) as address:
        running = Started(
            tmp_path, "sweep", f"http://{address}", *SMALL[:4], "--concurrency", "1,2",
            "--requests", "5", "--json", str(result),
        )  # fmt: skip
        running.wait_for("[1/2] 1 stream: running")
        time.sleep(0.7)  # five requests of 4 ms are long done; it waits for the counter
        running.process.send_signal(signal.SIGINT)
        code, _, said = running.end()
    assert code == 130, said
    levels = json.loads(result.read_bytes())["levels"]
    assert levels[0]["requests"]["ok"] == 5


def test_a_second_one_ends_at_once(tmp_path: Path) -> None:
    """The first waits for a last look at the server, which hangs; the second waits for nothing."""
    scraped = 0

    async def metrics(_: int, out: Writer) -> None:
        nonlocal scraped
        scraped += 1
        if scraped > 3:
            await silence(0, out)
        name = f'{{model_name="{MODEL}"}}'
        page = f"vllm:num_requests_running{name} 0\nvllm:num_requests_waiting{name} 0\n"
        out.write(message(200, page.encode(), "text/plain; version=0.0.4"))

    database = tmp_path / "runs.db"
    with serving(SLOW, pages={"/metrics": metrics}) as address:
        running = Started(
            tmp_path, "sweep", f"http://{address}", *SMALL[:4], "--concurrency", "1",
            "--duration", "60s", "--db", str(database),
        )  # fmt: skip
        running.wait_for("[1/1] 1 stream: running")
        time.sleep(1.5)
        running.process.send_signal(signal.SIGINT)
        running.wait_for("once more ends at once")
        running.process.send_signal(signal.SIGINT)
        code, out, said = running.end(timeout_s=3)
    assert code == 130
    assert out == ""
    assert said.rstrip().endswith("ended at once; finished levels are in the store")
