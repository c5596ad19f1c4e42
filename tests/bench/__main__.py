"""`python -m tests.bench`: the truth beside what `loadgen run` reports, as Markdown tables.

Every case starts the server of exactly known timing, drives the real command against it, and takes
for each figure the median of the runs. Where other load generators are installed (`make peers`),
they are run on the same server, once each. The agent is watched beside a server's metrics page and
simulated GPUs; of it nothing is reported but what the system counts. A bar that is missed is said,
and is no failure: on a machine that does other work beside, only a quiet repetition tells.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from loadgen.calibrate import raise_descriptors, this_machine
from loadgen.targets import truth
from tests.bench import (
    agent,
    browse,
    child,
    demands,
    history,
    peers,
    published,
    replay,
    scenarios,
)
from tests.conftest import find_chromium

Figures = dict[str, float]


class Bench(NamedTuple):
    """What a case gets."""

    directory: Path
    runs: int
    quick: bool
    others: list[peers.Found]
    comparison: list[str]  # lines of the table that compares; the cases add to it
    watch_s: float  # how long the agent is watched

    def medians(self, once: Callable[[], Figures]) -> Figures:
        """Each figure's median of the runs that have it: not every one opens connections, say."""
        every = [once() for _ in range(self.runs)]
        return {
            name: statistics.median(figures[name] for figures in every if name in figures)
            for name in sorted(set().union(*every))
        }

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

    def peer(self, server: truth.Truth, found: peers.Found, streams: int, requests: int) -> Figures:
        """One run of another load generator: its figures, and the truth of its own run."""
        directory = self.directory / f"{found.peer.program}-{time.monotonic_ns()}"
        tokenizer = self.directory / "tokenizer"
        directory.mkdir()
        if not tokenizer.exists():
            peers.make_tokenizer(found.python, tokenizer)
        load = peers.Load(server.url, streams, requests, tokenizer, directory)
        server.reset()
        ended = child.run(found.command(load), env=found.environment(), timeout_s=peers.TIMEOUT_S)
        if ended.code != 0:
            raise PeerError(_last_line(ended.stderr or ended.stdout))
        true = server.summary()
        extra = int(true["requests"]) - requests  # of its own, before the load
        reported = {name: value for name, value in found.peer.read(directory).items() if value}
        return {
            **_flat("true ", server.summary(skip=max(0, extra))),
            **_flat("", reported),
            "client cpu_s": ended.cpu_s,
        }

    def cost_without_load(self, server: truth.Truth, *options: str) -> float:
        """CPU seconds of the same command with next to nothing to do: imports, probes, report."""
        return self.medians(lambda: self.load(server, *options))["client cpu_s"]


class PeerError(Exception):
    """Another load generator failed; its own last words."""


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


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
SPARE_DESCRIPTORS = 200


def _streams(bench: Bench, streams: int, per_stream: int) -> Figures:
    options = ("--output-tokens", str(TOKENS), *PROMPT)
    with truth.serving(ttft_ms=TTFT_MS, itl_ms=ITL_MS) as server:
        idle_s = bench.cost_without_load(
            server, "--concurrency", "1", "--requests", "1", "--output-tokens", "1", *PROMPT
        )
        requests = str(streams * per_stream)
        load = ("--concurrency", str(streams), "--requests", requests, *options)
        figures = bench.medians(lambda: bench.load(server, *load))
        bench.comparison.append(_compared("**loadgen**", streams, figures))
        for found in bench.others:
            bench.comparison.append(_compared_peer(bench, server, found, streams, int(requests)))
    tokens = figures["true tokens"]
    figures["possible"] = streams * TOKENS / ((TTFT_MS + (TOKENS - 1) * ITL_MS) / 1e3)
    figures["client us_per_token"] = (figures["client cpu_s"] - idle_s) * 1e6 / tokens
    figures["true us_per_token"] = figures["true cpu_s"] * 1e6 / tokens
    return figures


def _compared(name: str, streams: int, figures: Figures, of_means: bool = False) -> str:
    """A line of the table that compares: what was reported and, in brackets, what was true."""

    def beside(figure: str, truth: str | None = None, note: str = "") -> str:
        told, true = figures.get(figure), figures.get(f"true {truth or figure}")
        return f"{_number(told) or '–'}{note} ({_number(true)})"

    cells = (
        f"{streams:,}",
        name,
        beside("ttft_ms.mean"),
        beside("ttft_ms.p99"),
        beside("itl_ms.p99", note="*" if of_means else ""),
        beside("output_tokens_per_s", "tokens_per_s"),
        _number(figures["true streams_mean"]),
        _number(figures["client cpu_s"]),
    )
    return f"| {' | '.join(cells)} |"


def _compared_peer(
    bench: Bench, server: truth.Truth, found: peers.Found, streams: int, requests: int
) -> str:
    name = f"{found.peer.name} {found.version}"
    try:
        figures = bench.peer(server, found, streams, requests)
    except (PeerError, OSError, KeyError, ValueError) as error:
        return f"| {streams:,} | {name} | failed: {str(error)[:80]} | | | | | |"
    return _compared(name, streams, figures, found.peer.itl_of_means)


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
        Row("memory at its peak, MB", None, figures["client rss_mb"]),
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


def streams_10000(bench: Bench) -> list[Row]:
    """Many users who read slowly: are all held, and what do they cost in memory?"""
    streams = 500 if bench.quick else 10_000
    if (room := raise_descriptors() - SPARE_DESCRIPTORS) < streams:
        print(f"\nSkipped: {streams:,} streams need as many descriptors, and there is room for "
              f"{room:,} (`ulimit -Hn`).")  # fmt: skip
        return []
    tokens = "4" if bench.quick else "10"
    load = ("--concurrency", str(streams), "--requests", str(streams), "--output-tokens", tokens)
    with truth.serving(ttft_ms=1000, itl_ms=1000) as server:
        figures = bench.medians(lambda: bench.load(server, *load, *PROMPT))
    held, ok = figures["true streams_max"], figures["requests.ok"]
    return [
        Row("streams held at once", held, None, f"{streams:,}", held == streams),
        Row("requests completed", figures["true finished"], ok, f"{streams:,}", ok == streams),
        _at_most("memory of all client processes, MB", figures["client rss_mb"], 400),
        _near("TTFT mean, ms", figures, "ttft_ms.mean", None),
        _near("ITL p99, ms", figures, "itl_ms.p99", None),
        Row("CPU of the whole command, s", None, figures["client cpu_s"]),
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


# The agent's buffers fill for minutes; before that its memory says nothing.
FLAT_FROM_S, FLAT_WITHIN_MB = 300.0, 2.0


def agent_beside(bench: Bench) -> list[Row]:
    """The daemon at its defaults, from its start."""
    folder = bench.directory / "agent"
    folder.mkdir()
    try:
        figures = agent.measure(folder, bench.watch_s, bench.runs, print)
    except agent.AgentError as error:
        return [Row(f"FAILED: {error}", None, None, "runs", False)]
    growth = figures["rss_mb_late"] - figures["rss_mb_early"]
    long_enough = figures["watched_s"] >= FLAT_FROM_S
    return [
        _at_most(f"CPU over {figures['watched_s']:.0f} s, % of a core", figures["cpu_percent"],
                 0.5),
        _at_most("memory at its most, all processes, MB", figures["rss_mb_max"], 100),
        _at_most("memory grown from the third tenth to the last, MB", growth, FLAT_WITHIN_MB)
        if long_enough else Row("memory grown (too short to judge), MB", None, growth),
        Row("slope of memory, MB an hour", None, figures["rss_mb_an_hour"]),
        _at_most("start to ready, s", figures["ready_s"], 2),
        Row("CPU of the start, s", None, figures["start_cpu_s"]),
        Row("SIGTERM to its end, s", None, figures["stop_s"]),
        _at_most("samples that failed", figures["failed"], 0),
        Row("its files after that, MB", None, figures["store_mb"]),
        Row("cores that others used", None, figures["others_cores"]),
    ]  # fmt: skip


def agent_store(bench: Bench) -> list[Row]:
    """Replayed at speed: what is kept, and how long questions take."""
    folder = bench.directory / "history"
    folder.mkdir()
    told = history.measure(folder, *((2.0, 0.1) if bench.quick else (7.0, 1.0)))
    what, slowest_s, _ = max(told.questions, key=lambda asked: asked[1])
    return [
        _at_most("kept in the end, MB a day", told.kept_bytes_a_day / 1e6, 5),
        _at_most("after a year, MB", told.year_bytes / 1e6, 2000),
        _at_most(f"slowest question ({what}), s", slowest_s, 1),
        Row("the writer's share of a core, %", None, 100 * told.core),
        Row("written to disk, kB/s", None, told.disk_bytes_per_s / 1e3),
        Row("check after an unclean stop, s", None, told.check_s),
    ]


def agent_page(bench: Bench) -> list[Row]:
    """From the address to the charts, in a browser, and what the page asks for by range."""
    if find_chromium() is None:
        print("\nSkipped: no Chromium to open the page with.")
        return []
    folder = bench.directory / "page"
    folder.mkdir()
    figures = browse.measure(folder)
    shown = [_opening(name, figures) for name in (browse.FIRST, browse.RANGES[-1])]
    questions = [name for name in figures if f"cpu {name}" in figures]
    tables = {f"{name}, s": figures[name] for name in questions if name.startswith(browse.RANGES)}
    others = {f"{name}, s": figures[name] for name in questions if f"{name}, s" not in tables}
    cpu = max(questions, key=lambda name: figures[f"cpu {name}"])
    return [
        *itertools.chain(*shown),
        *(_at_most(name, took_s, browse.QUESTION_S_MAX) for name, took_s in tables.items()),
        *(Row(name, None, took_s) for name, took_s in others.items()),
        Row(f"most CPU for one question ({cpu}), s", None, figures[f"cpu {cpu}"]),
    ]


def _opening(name: str, figures: Figures) -> list[Row]:
    took_s, whole_s, cpu_s = (figures.pop(f"{of} {name}") for of in ("opens", "whole", "cpu whole"))
    what = f"opens with {name}: every chart is drawn, s"
    is_first = name == browse.FIRST  # what the address alone shows
    return [
        _at_most(what, took_s, browse.OPEN_S_MAX) if is_first else Row(what, None, took_s),
        Row(f"… {name}: the curve and the hours of 7 days too, s", None, whole_s),
        Row(f"… {name}: CPU of the agent for all of that, s", None, cpu_s),
    ]


def replayed(bench: Bench) -> list[Row]:
    """How much headroom public traces need, and how fast that is found out."""
    if (why := replay.missing()) is not None:
        print(f"\nSkipped: {why}.")
        return []
    found = replay.show(replay.CASES[:1] if bench.quick else replay.CASES)
    speed = bench.medians(lambda: {name: replay.fast(name) for name in (replay.CHAT, replay.LONG)})
    return [
        *(
            _at_least(f"{name}: requests replayed in a second of CPU, of 200,000", None, rps,
                      replay.FAST_RPS)
            for name, rps in speed.items()
        ),
        _at_least("traces for which a flat +20 % is wrong", None,
                  sum(one.flat_wait_s > 2 for one in found), 1),
    ]  # fmt: skip


def capacity_model(_: Bench) -> list[Row]:
    """The capacity model against published benchmarks, whole lengths, GPUs and engines held out."""
    if not published.TABLE.exists():
        print(f"\nSkipped: no published benchmarks ({published.TABLE}; see SERVEFIT_SHARED).")
        return []
    figures, tables = published.outcome(published.TABLE)
    print("\n" + "\n\n".join(tables))
    return [Row(one.what, None, one.value, one.bar, one.reached) for one in figures]


def verdicts(bench: Bench) -> list[Row]:
    """Planted scenarios, judged from a store against what the simulator knows of them."""
    found = scenarios.show(scenarios.QUICK if bench.quick else scenarios.ALL, bench.directory)
    thin = [one for one in found if one.is_thin]
    share = 100 * sum(one.is_right for one in found) / len(found)
    return [
        Row("scenarios", None, float(len(found))),
        _at_least("judged right, %", None, share, 95),
        _at_most("OVER_SIZED where less hardware breaks the SLO",
                 sum(one.is_dangerous for one in found), 0),
        _at_least("thin evidence that is told as such, %", None,
                  100 * sum(one.is_right for one in thin) / max(1, len(thin)), 100),
    ]  # fmt: skip


def recorded_demands(bench: Bench) -> list[Row]:
    """Recorded requests judged from files, against what the swept engine itself does with them."""
    if (why := replay.missing()) is not None:
        print(f"\nSkipped: {why}.")
        return []
    found = demands.show(("L4 chat",) if bench.quick else ())
    broken = [one for one in found if one.missed > 1]
    kept = [one for one in found if one.missed <= 1]

    def share(some: list[demands.Judged], finding: str) -> float:
        known = [one for one in some if one.is_known and one.lengths == demands.OWN]
        return 100 * sum(one.finding == finding for one in known) / max(1, len(known))

    return [
        Row("verdicts", None, float(len(found))),
        _at_most("RIGHT_SIZED where the SLO breaks", sum(one.is_wrong for one in broken), 0),
        _at_most("UNDER_SIZED where the SLO holds", sum(one.is_wrong for one in kept), 0),
        Row("replayed, of those that break: told UNDER_SIZED, %", None,
            share(broken, "UNDER_SIZED")),
        Row("replayed, of those that hold: told RIGHT_SIZED, %", None, share(kept, "RIGHT_SIZED")),
    ]  # fmt: skip


# A further case is a function and a line here.
CASES: tuple[tuple[str, Callable[[Bench], list[Row]]], ...] = (
    ("256 streams × 100 tokens/s", streams_256),
    ("1,000 streams × 100 tokens/s", streams_1000),
    ("10,000 open streams × 1 token/s", streams_10000),
    ("open loop, 2,000 requests/s at constant gaps, one token, not streamed", open_loop_2000),
    ("one token, not streamed, as fast as they go", one_token_requests),
    ("start", start_up),
    (f"agent, beside a vLLM page of {agent.PAGE.stat().st_size // 1000} kB and {agent.GPUS} GPUs "
     "(NVML is a stand-in in C: no driver is asked)", agent_beside),
    (f"agent, its store beside {history.GPUS} GPUs and {history.SERVERS} servers, replayed",
     agent_store),
    (f"agent, its page over {browse.DAYS} days beside {history.GPUS} GPUs and {history.SERVERS} "
     "servers", agent_page),
    ("replay of public traces", replayed),
    ("capacity model", capacity_model),
    ("verdicts", verdicts),
    ("verdicts on recorded requests, from files", recorded_demands),
)  # fmt: skip


# ----------------------------------------------------------------------------------------- output


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _show(title: str, rows: list[Row]) -> None:
    if not rows:
        return
    print(f"\n## {title}\n")
    print("| | true | reported | bar | reached |\n| --- | ---: | ---: | --- | --- |")
    for row in rows:
        reached = {True: "yes", False: "**no**", None: ""}[row.reached]
        cells = (row.what, _number(row.true), _number(row.reported), row.bar, reached)
        print(f"| {' | '.join(cells)} |", flush=True)


COMPARISON = (
    "| streams | | TTFT mean, ms (true) | TTFT p99 (true) | ITL p99 (true) | tokens/s (true) "
    "| in flight | CPU s |\n| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def _show_summary(bench: Bench, results: list[tuple[str, list[Row]]]) -> None:
    """What the README carries: all load generators, then every bar."""
    print(f"\n# Summary\n\n{_machine()}.\n")
    if bench.comparison:
        print(COMPARISON)
        print("\n".join(bench.comparison))
        if any(found.peer.itl_of_means for found in bench.others):
            print("\n\\* of each request's mean, not of its gaps.")
    print("\n| case | figure | true | reported | bar | reached |")
    print("| --- | --- | ---: | ---: | --- | --- |")
    for title, rows in results:
        for row in rows:
            if row.reached is not None:
                reached = "yes" if row.reached else "**no**"
                cells = (title, row.what, _number(row.true), _number(row.reported), row.bar)
                print(f"| {' | '.join(cells)} | {reached} |")


def _machine() -> str:
    machine = this_machine()
    return (
        f"{datetime.date.today()}; {machine.cores} cores ({machine.cpu_model}), "
        f"Linux {platform.release()}, Python {machine.python}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one short run of each, minutes in all"
    )
    parser.add_argument("--only", metavar="WORDS", help="cases whose title contains this")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=None,
                        help="other load generators too [default: unless --quick]")  # fmt: skip
    parser.add_argument("--seconds", type=float, metavar="S",
                        help="watch the agent for so long [default: 600, quick 60]")  # fmt: skip
    given = parser.parse_args()
    if truth.program() is None:
        print("bench: the ground-truth server needs Linux and a C compiler (cc); nothing measured")
        return 0
    runs = 1 if given.quick else 3
    found = peers.find() if (given.peers if given.peers is not None else not given.quick) else []
    names = ", ".join(f"{one.peer.name} {one.version}" for one in found) or "none (`make peers`)"
    print(f"# Truth and report\n\n{_machine()}; load average before the start "
          f"{os.getloadavg()[0]:.1f}; {'one run' if given.quick else 'median of 3'}; "
          f"other load generators, one run each: {names}.")  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        watch_s = given.seconds or (60.0 if given.quick else 600.0)
        bench = Bench(Path(directory), runs, given.quick, found, [], watch_s)
        results = []
        for title, case in CASES:
            if not given.only or given.only in title:
                rows = case(bench)
                results.append((title, rows))
                _show(title, rows)
        _show_summary(bench, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
