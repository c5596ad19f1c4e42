"""The benchmark's own arithmetic, and the page that moves."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from agent.samplers.server import ServerSampler
from tests.bench import agent, page
from tests.bench.agent import Look


def looks(rss_mb: Sequence[float], cores: float = 0.004) -> list[Look]:
    return [Look(1000.0 + at, 0.7 + cores * at, mb) for at, mb in enumerate(rss_mb)]


def test_what_it_took() -> None:
    figures = agent.cost(looks([80.0] * 601))
    assert figures["watched_s"] == 600
    assert figures["cpu_percent"] == pytest.approx(0.4)
    assert figures["rss_mb_max"] == figures["rss_mb_early"] == figures["rss_mb_late"] == 80
    assert figures["rss_mb_an_hour"] == pytest.approx(0)


def test_a_leak_shows_and_a_warm_up_does_not() -> None:
    dice = random.Random(0)
    leak = agent.cost(looks([80 + at / 60 + dice.random() for at in range(601)]))
    assert leak["rss_mb_an_hour"] == pytest.approx(60, rel=0.02)
    assert leak["rss_mb_late"] - leak["rss_mb_early"] == pytest.approx(7, abs=0.5)
    warm = agent.cost(looks([80 - 20 * math.exp(-at / 20) for at in range(601)]))
    assert abs(warm["rss_mb_late"] - warm["rss_mb_early"]) < 0.1
    spike = agent.cost(looks([80.0] * 300 + [150.0] + [80.0] * 300))
    assert (spike["rss_mb_max"], spike["rss_mb_late"]) == (150, 80)


def test_the_cpu_of_a_process_and_of_its_children() -> None:
    stat = "17 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 250 50 25 75 20 0 1 0 100"
    assert agent.cpu_of(stat) == 400 / os.sysconf("SC_CLK_TCK")


def test_a_look_sees_what_a_child_takes() -> None:
    spin = "import time\nwhile time.process_time() < 0.1: pass\n"
    code = f"import subprocess, sys\n{spin}subprocess.run([sys.executable, '-c', {spin!r}])\n"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        seen = agent.look(process.pid)
        process.kill()
    assert 0.18 <= seen.cpu_s < 10  # two ticks less, for what is rounded down
    assert 5 < seen.rss_mb < 100
    assert seen.at_s <= time.monotonic()


RECORDED = """# HELP a_total Things.
# TYPE a_total counter
a_total{x="1 2"} 10.0
# TYPE h histogram
h_bucket{le="1"} 3.0
h_bucket{le="+Inf"} 7.0
h_count 7.0
h_sum 2.5
h_created 1.7e+09
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 40.0
"""


def test_counters_move_together_and_nothing_else() -> None:
    recorded = page.lines(RECORDED)
    later = page.moved(recorded, page.DOUBLES_IN_S / 2).decode().splitlines()
    assert later[2:9] == [
        'a_total{x="1 2"} 15.0', "# TYPE h histogram", 'h_bucket{le="1"} 4.0',
        'h_bucket{le="+Inf"} 10.0', "h_count 10.0", "h_sum 3.75", "h_created 1.7e+09",
    ]  # fmt: skip
    assert 20 <= float(later[-1].split()[-1]) <= 40


async def test_the_recorded_page_is_served_and_read() -> None:
    with agent.page_server() as url:
        sampler = ServerSampler(f"{url}/metrics", full=True)
        first = await sampler.sample()
        second = await sampler.sample()
        await sampler.close()
    assert sampler.engine == "vllm"
    assert 45_000 < sampler.page_bytes < 60_000
    assert (sampler.malformed, sampler.duplicates) == (0, 0)
    assert len(first) == len(second) > 100
    risen = [(a.value, b.value) for a, b in zip(first, second, strict=True)
             if a.name == "output_tokens_total"]  # fmt: skip
    assert risen
    assert all(a <= b for a, b in risen)
