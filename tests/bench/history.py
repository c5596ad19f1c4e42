"""`python -m tests.bench.history`: the store's size and question times, as Markdown tables.

A week beside 8 GPUs (10 fields a second) and 4 servers (40 fields and 9 histograms every 5 s) is
replayed at speed into a store in a temporary directory, minutes over a longer time than raw. The
values walk as real ones do: temperatures in degrees, utilization in percent, power in milliwatts,
counters that rise, some series that never change.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from agent.history import History
from agent.metrics import CATALOGUE
from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.model import Reading
from agent.recall import Recall
from agent.tiers import DAY_S, Settings
from agent.timeline import Timeline

GPUS, SERVERS = 8, 4
BLOCK_S = 300
START = 1_760_000_000 // 86_400 * 86_400
YEAR_DAYS = 365
YEAR_BYTES_MAX, KEPT_A_DAY_MAX, QUESTION_S_MAX = 2e9, 5e6, 1.0

# What the page asks for: its ranges with their steps (s), and the series of its charts.
PAGE = (
    (900, 5), (3600, 20), (21_600, 60), (86_400, 300), (7 * DAY_S, 3600), (30 * DAY_S, 10_800),
    (90 * DAY_S, 21_600),
)  # fmt: skip
SERVER_METRICS = (
    "requests_running", "requests_waiting", "requests_per_s", "output_tokens_per_s",
    "prompt_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p95_ms",
    "itl_p99_ms", "kv_usage_ratio",
)  # fmt: skip
GPU_METRICS = (
    "gpu_memory_used_bytes", "gpu_memory_total_bytes", "gpu_utilization_ratio", "gpu_power_w",
    "energy_j_per_output_token",
)  # fmt: skip

BOUNDS = (*(0.001 * 2**n for n in range(20)), math.inf)
HISTOGRAMS = ("ttft", "itl", "e2e", "queue", "prefill", "decode", "prompt", "output", "tpot")

Labels = tuple[tuple[str, str], ...]


class Walk(NamedTuple):
    """A series: its next value from the last one."""

    name: str
    labels: Labels
    first: float
    step: Callable[[random.Random, float], float]
    is_counter: bool = False


def _constant(_: random.Random, value: float) -> float:
    return value


def _between(low: int, high: int, unit: float) -> Callable[[random.Random, float], float]:
    """A walk in whole units between two bounds."""

    def step(dice: random.Random, value: float) -> float:
        return min(high, max(low, round(value / unit) + dice.randint(-3, 3))) * unit

    return step


def _rising(by: float) -> Callable[[random.Random, float], float]:
    return lambda dice, value: value + int(dice.random() * 2 * by)


def _noise(dice: random.Random, value: float) -> float:
    return dice.random()


def _gpu(number: int) -> list[Walk]:
    labels = (("gpu", f"GPU-0c8e2f1a-4b52-4c7e-9a55-0000000000{number:02}"),)
    fields: list[tuple[str, float, Callable[[random.Random, float], float]]] = [
        ("gpu_memory_used_bytes", 74e9, _constant),
        ("gpu_memory_total_bytes", 80e9, _constant),
        ("gpu_utilization_ratio", 0.9, _between(40, 100, 0.01)),
        ("gpu_power_w", 400.0, lambda dice, value: round(dice.gauss(400, 15), 3)),
        ("gpu_temperature_c", 60, _between(50, 70, 1)),
        ("gpu_throttled", 0, _constant),
        ("gpu_sm_clock_hz", 1980e6, _between(110, 132, 15e6)),
        ("gpu_memory_clock_hz", 2619e6, _constant),
        ("gpu_pcie_rx_bytes_per_s", 1e6, lambda dice, value: float(dice.randint(0, 10**8) * 1024)),
    ]
    walks = [Walk(name, labels, first, step) for name, first, step in fields]
    energy = Walk("gpu_energy_j", labels, 1e6, lambda d, v: round(v + d.gauss(400, 15), 3), True)
    return [*walks, energy]


def _server() -> list[Walk]:
    walks = [
        Walk("requests_running", (), 20, _between(0, 64, 1)),
        Walk("requests_waiting", (), 0, _between(0, 9, 1)),
        Walk("kv_usage_ratio", (), 0.5, _noise),
        Walk("kv_capacity_tokens", (), 524_288, _constant),
        Walk("server_start_unix_s", (), 1.7e9, _constant),
    ]
    totals = [name for name, one in CATALOGUE.items() if name.endswith("_total")]
    walks += [Walk(name, (), 0, _rising(300), True) for name in totals]
    walks += [
        Walk(f"{name}_seconds_{end}", (), 0, step, True)
        for name in HISTOGRAMS
        for end, step in (("sum", lambda d, v: v + d.random()), ("count", _rising(10)))
    ]
    more = 40 - len(walks)
    return walks + [Walk(f"more_{n}", (), 0, _between(0, 200, 1)) for n in range(more)]


class Source:
    """One source that walks: its samples, and its minutes."""

    def __init__(self, name: str, walks: list[Walk], interval_s: int, is_server: bool) -> None:
        self.name, self.walks, self.interval_s = name, walks, interval_s
        self.is_server = is_server
        self.values = [walk.first for walk in walks]
        self.dice = random.Random(name)

    def samples(self, length_s: int, at_ns: int) -> Iterator[list[Reading]]:
        for second in range(0, length_s, self.interval_s):
            at = at_ns + second * 10**9 + self.dice.randint(0, 3_000_000)
            dice, values = self.dice, self.values
            values[:] = [
                walk.step(dice, value) for walk, value in zip(self.walks, values, strict=True)
            ]
            yield [
                Reading(at, walk.name, value, walk.labels)
                for walk, value in zip(self.walks, values, strict=True)
            ]

    def minute(self, start: int) -> Minute:
        taken = [list(sample) for sample in self.samples(20, 0)]
        values = []
        for walk, *points in zip(self.walks, *taken, strict=True):
            numbers = [point.value for point in points]
            rise = numbers[-1] - numbers[0] if walk.is_counter else None
            values.append(
                MinuteValue(
                    walk.name, walk.labels, 60 // self.interval_s,
                    math.fsum(numbers) / len(numbers), min(numbers), max(numbers), numbers[-1],
                    None if rise is None else rise * 1.2345,
                )
            )  # fmt: skip
        histograms = [self._histogram(name) for name in HISTOGRAMS if self.is_server]
        return Minute(self.name, start, tuple(values), tuple(histograms), 60.0, 0, ())

    def _histogram(self, name: str) -> MinuteHistogram:
        """Eight buckets of twenty hold something, shared out by time over two minutes."""
        counts = [0.0] * len(BOUNDS)
        for at in range(6, 14):
            counts[at] = self.dice.randint(0, 300) / 5 * (1 + self.dice.random())
        return MinuteHistogram(f"{name}_seconds", (), BOUNDS, tuple(counts))


def sources() -> list[Source]:
    gpus = [walk for number in range(GPUS) for walk in _gpu(number)]
    servers = [Source(f"server-{n}", _server(), 5, True) for n in range(SERVERS)]
    return [Source("nvml", gpus, 1, False), *servers]


class Clock:
    def __init__(self) -> None:
        self.ns = START * 10**9

    def __call__(self) -> int:
        return self.ns


# ----------------------------------------------------------------------------------------- replay


def replay(path: Path, minute_days: float, raw_days: float) -> float:
    """Fills a store; the processor time that its writer took, s."""
    clock, every = Clock(), sources()
    blocks = round(minute_days * DAY_S / BLOCK_S)
    raw_from = blocks - round(raw_days * DAY_S / BLOCK_S)
    settings = Settings(raw_s=None, minutes_s=None)
    with History(path, settings, timeline=Timeline(clock, clock), upkeep_every_s=0.0) as history:
        for block in range(blocks):
            start = START + block * BLOCK_S
            for source in every:
                if block >= raw_from:
                    for sample in source.samples(BLOCK_S, start * 10**9):
                        history.add_readings(source.name, sample)
                for n in range(BLOCK_S // 60):
                    history.add_minute(source.minute(start + 60 * n))
            clock.ns += BLOCK_S * 10**9
            if not history.flush(120):
                raise SystemExit(f"the store does not keep up: {history.state().error}")
        clock.ns += 2 * 3600 * 10**9
        history.flush(120)
        state = history.state()
        if state.readings_dropped or state.minutes_dropped or state.write_errors:
            raise SystemExit(f"not everything was kept: {state}")
        return history.submit(lambda _: time.thread_time()).result()


def beside(path: Path, length_s: int) -> tuple[float, float]:
    """A commit a second, as in life: share of a core the writer takes, bytes to disk a second."""
    clock, every = Clock(), sources()
    with History(path, timeline=Timeline(clock, clock)) as history:
        per_second = {
            source.name: list(source.samples(length_s, clock.ns)) for source in every
        }  # made before, so that only the store is measured
        minutes = [[source.minute(START + at) for source in every] for at in range(0, length_s, 60)]
        before_s = history.submit(lambda _: time.thread_time()).result()
        written = _bytes_written()
        for second in range(length_s):
            for source in every:
                if second % source.interval_s == 0:
                    sample = per_second[source.name][second // source.interval_s]
                    history.add_readings(source.name, sample)
            if second % 60 == 59:
                for one in minutes[second // 60]:
                    history.add_minute(one)
            clock.ns += 10**9
            history.flush()
        used_s = history.submit(lambda _: time.thread_time()).result() - before_s
    return used_s / length_s, (_bytes_written() - written) / length_s


def _bytes_written() -> int:
    """What this process has sent to disks, where the system counts it; else 0."""
    try:
        lines = Path("/proc/self/io").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


# ---------------------------------------------------------------------------------------- figures


def tier_bytes(path: Path) -> dict[str, int]:
    """What each table's pages take, its indices with it."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = connection.execute("select name, sum(pgsize) from dbstat group by name").fetchall()
    finally:
        connection.close()
    return dict(rows)


def questions(path: Path, days: float) -> Iterator[tuple[str, float, int]]:
    """(question, s, points), each by a connection of its own, as `agent query` asks it."""
    to = START + days * DAY_S
    asked: list[tuple[str, str, float, float | None, str | None]] = [
        ("1 hour, GPU power of all, 12 s steps", "gpu_power_w", 1 / 24, None, None),
        ("1 day, KV use of one server, 5 min steps", "kv_usage_ratio", 1, None, "server-0"),
        ("7 days, tokens/s of all, 1 min steps", "output_tokens_per_s", 7, 60, None),
        ("30 days, tokens/s of one server", "output_tokens_per_s", 30, None, "server-0"),
        ("30 days, GPU power of all, 1 h steps", "gpu_power_w", 30, 3600, None),
        ("30 days, KV use of one server, 1 min steps", "kv_usage_ratio", 30, 60, "server-0"),
        ("30 days, energy per token, 1 h steps", "energy_j_per_output_token", 30, 3600, None),
    ]
    for what, metric, span_days, step_s, server in asked:
        if span_days > days:
            continue
        begin = time.perf_counter()
        with Recall(path) as recall:
            series = recall.series(metric, to - span_days * DAY_S, to, step_s, server=server)
        yield what, time.perf_counter() - begin, len(series.points)
    for span_s, step_s in PAGE:
        if span_s > days * DAY_S:
            continue
        for whose, names in (("servers", SERVER_METRICS), ("GPUs", GPU_METRICS)):
            begin = time.perf_counter()
            with Recall(path) as recall:
                table = recall.table(names, to - span_s, to, step_s)
            points = sum(len(column.values) for column in table.metrics.values())
            what = f"the page, {span_s / 3600:g} hours, {whose}' {len(names)} series"
            yield what, time.perf_counter() - begin, points
    begin = time.perf_counter()
    with Recall(path) as recall:
        kept = sum(1 for _ in recall.minutes("server-0", to - DAY_S, to))
    yield "1 day, every minute record of one server", time.perf_counter() - begin, kept


def check_s(path: Path) -> float:
    """What a start after an unclean stop takes longer."""
    begin = time.perf_counter()
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.execute("pragma quick_check(1)").fetchall()
    connection.close()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.history", description=__doc__)
    parser.add_argument("--minute-days", type=float, default=30.0)
    parser.add_argument("--raw-days", type=float, default=7.0)
    parser.add_argument("--quick", action="store_true", help="two days, a few hours of raw")
    options = parser.parse_args()
    minute_days, raw_days = (
        (2.0, 0.25) if options.quick else (options.minute_days, options.raw_days)
    )
    with tempfile.TemporaryDirectory() as place:
        _print(measure(Path(place), minute_days, raw_days))


class Tier(NamedTuple):
    name: str
    a_day_bytes: float
    kept_days: float  # within a year


class Measured(NamedTuple):
    minute_days: float
    raw_days: float
    tiers: list[Tier]
    core: float  # share of one that the writer takes as in life
    disk_bytes_per_s: float
    took_s: float
    writer_s: float
    check_s: float
    file_bytes: int
    questions: list[tuple[str, float, int]]  # what, s, points

    @property
    def kept_bytes_a_day(self) -> float:
        """What is never forgotten: the hours."""
        return self.tiers[-1].a_day_bytes

    @property
    def year_bytes(self) -> float:
        return sum(tier.a_day_bytes * tier.kept_days for tier in self.tiers)


def measure(folder: Path, minute_days: float, raw_days: float) -> Measured:
    core, disk = beside(folder / "beside.db", 600)
    path = folder / "history.db"
    begin = time.perf_counter()
    writer_s = replay(path, minute_days, raw_days)
    took_s = time.perf_counter() - begin
    sizes, defaults = tier_bytes(path), Settings()
    minutes = sizes["minute"] + sizes["minute_source"]
    hours = sizes["hour"] + sizes["hour_source"]
    return Measured(
        minute_days=minute_days,
        raw_days=raw_days,
        tiers=[
            Tier("raw", sizes["raw"] / raw_days, (defaults.raw_s or 0) / DAY_S),
            Tier("minutes", minutes / minute_days, (defaults.minutes_s or 0) / DAY_S),
            Tier("hours", hours / minute_days, YEAR_DAYS),
        ],
        core=core,
        disk_bytes_per_s=disk,
        took_s=took_s,
        writer_s=writer_s,
        check_s=check_s(path),
        file_bytes=path.stat().st_size,
        questions=list(questions(path, minute_days)),
    )


def _print(told: Measured) -> None:
    print(
        f"{GPUS} GPUs, {SERVERS} servers; {os.cpu_count()} cores, SQLite {sqlite3.sqlite_version}"
    )
    print(f"replayed {told.minute_days:g} days of minutes, {told.raw_days:g} of raw in "
          f"{told.took_s:.0f} s (the writer {told.writer_s:.0f} s)\n")  # fmt: skip
    print("| tier | MB a day | kept, days | MB after a year |\n| --- | ---: | ---: | ---: |")
    for name, a_day, days in told.tiers:
        print(f"| {name} | {a_day / 1e6:.2f} | {days:g} | {a_day * days / 1e6:,.0f} |")
    whole, kept = told.year_bytes, told.kept_bytes_a_day
    print(f"| all | | | {whole / 1e6:,.0f} ({_met(whole, YEAR_BYTES_MAX, '2,000')}) |")
    print(f"\nkept in the end: {kept / 1e6:.2f} MB a day ({_met(kept, KEPT_A_DAY_MAX, '5')})")
    print(f"a commit a second: {told.core:.3%} of a core, "
          f"{told.disk_bytes_per_s / 1e3:.0f} kB/s to disk")  # fmt: skip
    print(f"the check after an unclean stop: {told.check_s:.2f} s "
          f"for {told.file_bytes / 1e6:,.0f} MB\n")  # fmt: skip
    print("| question | s | points |\n| --- | ---: | ---: |")
    for what, seconds, points in told.questions:
        print(f"| {what} | {seconds:.3f} | {points:,} |")


def _met(value: float, bound: float, said: str) -> str:
    return f"≤ {said}: {'yes' if value <= bound else 'NO'}"


if __name__ == "__main__":
    main()
