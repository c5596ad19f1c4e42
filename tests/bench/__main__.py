"""`python -m tests.bench`: the truth beside what `loadgen run` reports, as Markdown tables.

Every case starts the server of exactly known timing, drives the real command against it, and takes
for each figure the median of the runs. A bar that is missed is said, and is no failure: on a
machine that does other work beside, only a quiet repetition tells.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from loadgen.targets import truth
from tests.bench import child

Figures = dict[str, float]


class Bench(NamedTuple):
    """What a case gets."""

    directory: Path
    runs: int
    quick: bool

    def medians(self, once: Callable[[], Figures]) -> Figures:
        """Each figure's median of the runs."""
        every = [once() for _ in range(self.runs)]
        return {name: statistics.median(figures[name] for figures in every) for name in every[0]}

    def load(self, server: truth.Truth, *options: str, rate: float = 0.0) -> Figures:
        """One run: `true …` are the server's figures, `…` the report's, `client …` the child's."""
        server.reset()
        database = self.directory / f"{time.monotonic_ns()}.db"
        ended, report = child.measure(server.url, database, *options)
        skip = report["run"]["overhead"]["probe_requests"]
        true = server.summary(skip=skip, rate=rate)
        return {
            **_flat("true ", true),
            **_flat("", report["levels"][0]),
            "client cpu_s": ended.cpu_s,
            "client rss_mb": ended.rss_mb,
            "others_cores": max(0.0, ended.others_cores - true["cpu_s"] / ended.wall_s),
            "first_request_s": (true["first_request_ns"] - ended.began_ns) / 1e9,
            "first_generation_s": (true["first_generation_ns"] - ended.began_ns) / 1e9,
        }

    def cost_without_load(self, server: truth.Truth, *options: str) -> float:
        """CPU seconds of the same command with next to nothing to do: imports, probes, report."""
        return self.medians(lambda: self.load(server, *options))["client cpu_s"]


def _flat(prefix: str, values: dict[str, Any]) -> Figures:
    """Numbers and truths of a nested object by the path of their names."""
    figures: Figures = {}
    for name, value in values.items():
        if isinstance(value, dict):
            figures |= _flat(f"{prefix}{name}.", value)
        elif isinstance(value, int | float):
            figures[prefix + name] = float(value)
    return figures


class Row(NamedTuple):
    """One line of a table; what is not known, or asked for, is None."""

    what: str
    true: float | None
    reported: float | None
    bar: str = ""
    reached: bool | None = None


def _near(what: str, figures: Figures, name: str, within: float | None) -> Row:
    true, reported = figures[f"true {name}"], figures[name]
    if within is None:
        return Row(what, true, reported)
    return Row(what, true, reported, f"±{within:g} of true", abs(reported - true) <= within)


def _at_most(what: str, value: float, bound: float) -> Row:
    return Row(what, None, value, f"≤ {bound:g}", value <= bound)


def _at_least(what: str, true: float | None, value: float, bound: float) -> Row:
    return Row(what, true, value, f"≥ {bound:g}", value >= bound)


# ------------------------------------------------------------------------------------------ cases

TTFT_MS, ITL_MS, TOKENS = 50.0, 10.0, 128
PROMPT = ("--input-tokens", "128")


def _streams(bench: Bench, streams: int, per_stream: int) -> Figures:
    options = ("--output-tokens", str(TOKENS), *PROMPT)
    with truth.serving(ttft_ms=TTFT_MS, itl_ms=ITL_MS) as server:
        idle_s = bench.cost_without_load(
            server, "--concurrency", "1", "--requests", "1", "--output-tokens", "1", *PROMPT
        )
        requests = str(streams * per_stream)
        load = ("--concurrency", str(streams), "--requests", requests, *options)
        figures = bench.medians(lambda: bench.load(server, *load))
    tokens = figures["true tokens"]
    figures["possible"] = streams * TOKENS / ((TTFT_MS + (TOKENS - 1) * ITL_MS) / 1e3)
    figures["client us_per_token"] = (figures["client cpu_s"] - idle_s) * 1e6 / tokens
    figures["true us_per_token"] = figures["true cpu_s"] * 1e6 / tokens
    return figures


def _stream_rows(figures: Figures, streams: int, ttft_within: float, p99s_within: float | None,
                 cpu_us: float) -> list[Row]:  # fmt: skip
    true_rate, rate = figures["true tokens_per_s"], figures["output_tokens_per_s"]
    return [
        _near("TTFT mean, ms", figures, "ttft_ms.mean", ttft_within),
        _near("TTFT p99, ms", figures, "ttft_ms.p99", p99s_within),
        _near("ITL mean, ms", figures, "itl_ms.mean", None),
        _near("ITL p99, ms", figures, "itl_ms.p99", p99s_within),
        Row("tokens/s", true_rate, rate, "98–102 % of true", 0.98 <= rate / true_rate <= 1.02),
        _at_least("tokens/s, % of possible", 100 * true_rate / figures["possible"],
                  100 * rate / figures["possible"], 98 if p99s_within else 95),
        _at_least("streams in flight, mean", figures["true streams_mean"],
                  figures["measurement.in_flight_mean"], 0.99 * streams),
        Row("CPU per token event, µs", figures["true us_per_token"],
            figures["client us_per_token"], f"≤ {cpu_us:g}",
            figures["client us_per_token"] <= cpu_us),
        Row("CPU of the whole command, s", None, figures["client cpu_s"]),
        Row("memory at its peak, MB", None, figures["client rss_mb"]),
        *_watch_rows(figures),
    ]  # fmt: skip


def _watch_rows(figures: Figures) -> list[Row]:
    """What the client says of itself, and what disturbed both."""
    return [
        Row("cores used in the level", None, figures["measurement.client_cpu"]),
        Row("loop lag p99, ms", None, figures["measurement.loop_lag_ms.p99"]),
        Row("send lag p99, ms", None, figures["measurement.send_lag_ms.p99"]),
        Row("calls itself valid (1) or not (0)", None, figures["measurement.valid"]),
        Row("the server's own lateness p99, ms", figures["true own_lag_ms.p99"], None),
        Row("cores that others used", figures["others_cores"], None),
    ]


def streams_256(bench: Bench) -> list[Row]:
    """What the client adds where neither side is near its limit."""
    figures = _streams(bench, 256, 5 if bench.quick else 10)
    return _stream_rows(figures, 256, 1.0, 1.0, 20)


def streams_1000(bench: Bench) -> list[Row]:
    """Client and server need a core each: the limit of a machine of two."""
    figures = _streams(bench, 1000, 4 if bench.quick else 8)
    return _stream_rows(figures, 1000, 15.0, None, 12)


def open_loop_2000(bench: Bench) -> list[Row]:
    """Does the schedule hold? The server sees by itself how late the requests come."""
    rate = 2000.0
    options = (
        "--rate", str(rate), "--arrival", "constant", "--no-stream", "--output-tokens", "1",
        "--duration", "4s" if bench.quick else "10s", *PROMPT,
    )  # fmt: skip
    with truth.serving(ttft_ms=5, itl_ms=0) as server:
        figures = bench.medians(lambda: bench.load(server, *options, rate=rate))
    achieved = figures["measurement.achieved_over_offered"]
    send_lag = figures["measurement.send_lag_ms.p99"]
    return [
        _at_least("requests/s achieved / offered", figures["true requests_per_s"] / rate, achieved,
                  0.999),
        Row("late at the server / send lag, p99, ms", figures["true late_ms.p99"], send_lag, "≤ 2",
            send_lag <= 2),
        Row("late at the server / send lag, max, ms", figures["true late_ms.max"],
            figures["measurement.send_lag_ms.max"]),
        Row("reply time mean, ms", figures["true reply_ms.mean"], figures["e2e_ms.mean"]),
        Row("CPU of the whole command, s", None, figures["client cpu_s"]),
        *_watch_rows(figures),
    ]  # fmt: skip


def one_token_requests(bench: Bench) -> list[Row]:
    """What a request costs when nothing streams: as many as go, over 64 connections."""
    requests = 5_000 if bench.quick else 20_000
    common = ("--no-stream", "--output-tokens", "1", *PROMPT)
    with truth.serving(ttft_ms=0, itl_ms=0) as server:
        idle_s = bench.cost_without_load(server, "--concurrency", "1", "--requests", "1", *common)
        load = ("--concurrency", "64", "--requests", str(requests), *common)
        figures = bench.medians(lambda: bench.load(server, *load))
    cost_us = (figures["client cpu_s"] - idle_s) * 1e6 / requests
    server_us = figures["true cpu_s"] * 1e6 / requests
    return [
        Row("CPU per request, µs", server_us, cost_us, "≤ 120", cost_us <= 120),
        Row("requests/s", figures["true requests_per_s"], figures["request_throughput"]),
        Row("memory at its peak, MB", None, figures["client rss_mb"]),
        *_watch_rows(figures),
    ]


def start_up(bench: Bench) -> list[Row]:
    """How long a user waits: for the help, and until the server hears of the command."""
    runs = bench._replace(runs=max(5, bench.runs))
    helped = runs.medians(lambda: {"s": child.run([*child.loadgen(), "--help"]).wall_s})
    load = ("--concurrency", "1", "--requests", "1", "--output-tokens", "1", *PROMPT)
    with truth.serving(ttft_ms=0, itl_ms=0) as server:
        figures = runs.medians(lambda: bench.load(server, *load))
    return [
        _at_most("loadgen --help, s", helped["s"], 0.15),
        _at_most("start to first request on the wire, s", figures["first_request_s"], 0.8),
        Row("start to first generation (a probe), s", None, figures["first_generation_s"]),
        Row("CPU of a run of one request, s", None, figures["client cpu_s"]),
        Row("memory of a run of one request, MB", None, figures["client rss_mb"]),
    ]


# A further case is a function and a line here.
CASES: tuple[tuple[str, Callable[[Bench], list[Row]]], ...] = (
    ("256 streams × 100 tokens/s", streams_256),
    ("1,000 streams × 100 tokens/s", streams_1000),
    ("open loop, 2,000 requests/s at constant gaps, one token, not streamed", open_loop_2000),
    ("one token, not streamed, as fast as they go", one_token_requests),
    ("start", start_up),
)


# ----------------------------------------------------------------------------------------- output


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _show(title: str, rows: list[Row]) -> None:
    print(f"\n## {title}\n")
    print("| | true | reported | bar | reached |\n| --- | ---: | ---: | --- | --- |")
    for row in rows:
        reached = {True: "yes", False: "**no**", None: ""}[row.reached]
        cells = (row.what, _number(row.true), _number(row.reported), row.bar, reached)
        print(f"| {' | '.join(cells)} |", flush=True)


def _machine() -> str:
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}; "
        f"load average before the start {load:.1f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short run of each, under 60 s")
    parser.add_argument("--only", metavar="WORDS", help="cases whose title contains this")
    given = parser.parse_args()
    if truth.program() is None:
        print("bench: the ground-truth server needs Linux and a C compiler (cc); nothing measured")
        return 0
    runs = 1 if given.quick else 3
    print(f"# Truth and report\n\n{_machine()}; {'one run' if given.quick else 'median of 3'}.")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), runs, given.quick)
        for title, case in CASES:
            if not given.only or given.only in title:
                _show(title, case(bench))
    return 0


if __name__ == "__main__":
    sys.exit(main())
