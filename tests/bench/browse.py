"""`python -m tests.bench.browse`: how long the agent's page takes to open, and what it asks for.

The store is made: 90 days of hours, eight of minutes and an hour of raw readings beside 8 GPUs and
4 servers, with a verdict an hour of each; minutes and readings that are older, no question of the
page reads. The agent is `agent run` beside a server's page that moves and NVML's ABI in C, the
browser a headless Chromium with an empty cache, on the same machine.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlite_utils

from agent.assess import assess
from agent.history import History
from agent.model import encode
from agent.recall import Recall
from agent.tiers import DAY_S, Settings
from agent.timeline import Timeline
from agent.web.app import SHARED_S
from tests import nvml_standin
from tests.bench import agent, history
from tests.conftest import find_chromium
from tests.loadgen.report import samples

DAYS, MINUTE_DAYS, RAW_S = 90, 8, 3600
OPENS, ASKED = 5, 5
JUDGED_WITHIN_S = 120
OPEN_S_MAX, QUESTION_S_MAX = 1.0, 0.3
UUID = "GPU-00000000-0000-0000-0000-{:012x}"
RANGES = ("15m", "1h", "6h", "24h", "7d", "30d", "90d")
FIRST = "1h"  # what the page shows when nobody chose

Figures = dict[str, float]


# -------------------------------------------------------------------------------------- the store


def sources() -> list[history.Source]:
    """Those of `tests.bench.history`, on the stand-in's GPUs."""
    nvml, *servers = history.sources()
    each = len(nvml.walks) // history.GPUS
    nvml.walks = [
        walk._replace(labels=(("gpu", UUID.format(number // each)),))
        for number, walk in enumerate(nvml.walks)
    ]
    return [nvml, *servers]


def make(path: Path, end_s: int) -> None:
    """One day is written as an agent does, and copied to the others; the last is its own."""
    last_day_s = end_s // 3600 * 3600 - int(DAY_S)
    begin_s = last_day_s - (DAYS - 1) * int(DAY_S)
    clock, every = history.Clock(), sources()
    settings = Settings(raw_s=None, minutes_s=None)
    with History(path, settings, timeline=Timeline(clock, clock), upkeep_every_s=0.0) as store:

        def live_through(start: int, end: int) -> None:
            clock.ns = start * 10**9
            for at in range(start, end, 300):
                for one in every:
                    store.add_minutes(one.name, [one.minute(at + 60 * n) for n in range(5)])
                    if at + RAW_S >= end_s:
                        for sample in one.samples(300, at * 10**9):
                            store.add_readings(one.name, sample)
                clock.ns = (at + 300) * 10**9
                store.flush(120)

        for number, one in enumerate(every[1:]):
            gpus = [UUID.format(2 * number + n) for n in range(2)]
            store.add_source(one.name, service=None, gpus=gpus)
        live_through(begin_s, begin_s + int(DAY_S))
        clock.ns += 3600 * 10**9
        store.flush(120)
        store.submit(lambda db: _copy(db, begin_s // 3600)).result(timeout=300)
        live_through(last_day_s, end_s)
        swept = samples.sweep()
        target = msgspec.structs.replace(swept.target, model="", gpus=[])
        store.add_curve(msgspec.structs.replace(swept, target=target), "server-0")
        store.flush(120)
        store.submit(lambda db: _judge(db, path, end_s)).result(timeout=300)


def _copy(db: sqlite_utils.Database, first: int) -> None:
    for day in range(1, DAYS - 1):
        hours = 24 * day
        minutes = ("minute",) if day >= DAYS - MINUTE_DAYS else ()
        for table in (*minutes, "hour"):
            kept = "n, mean, min, max, last, increase, counts"
            db.execute(
                f"""insert into {table}(key, {kept}) select key + (? << 32), {kept} from {table}
                    where key < ? << 32 order by key""",
                [hours, first + 24],
            )
            columns = "source, covered_s, counted_s, resets"
            columns += ", minute, part, marks, finished" if table == "minute" else ""
            db.execute(
                f"""insert into {table}_source(hour, {columns}) select hour + ?, {columns}
                    from {table}_source where hour < ?""",
                [hours, first + 24],
            )
    for table in ("minute", "minute_source"):
        db.execute(f"delete from {table} where hour < ?", [first + 24])


def _judge(db: sqlite_utils.Database, path: Path, end_s: int) -> None:
    """A real verdict of each server, every hour; once a week it says something else for a day."""
    with Recall(path) as recall:
        made = [
            (name, encode(assess(recall, server=name, window_s=DAY_S, slo=(), now_s=end_s).verdict))
            for name in recall.servers()
        ]
    rows = [
        (at, name, "BORDERLINE" if at // DAY_S % 7 == 0 else "CAPACITY_ONLY", text.decode())
        for at in range(end_s - DAYS * int(DAY_S), end_s, 3600)
        for name, text in made
    ]
    db.conn.executemany(
        "insert into assessments(at_unix_s, scope, finding, verdict) values (?, ?, ?, ?)", rows
    )


# -------------------------------------------------------------------------------------- measuring


@contextmanager
def running(folder: Path) -> Iterator[agent.Started]:
    """The agent over a store that ends now."""
    make(folder / "agent.db", int(time.time()) // 300 * 300)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(nvml_standin.compiled(folder).parent),
        "NVML_STANDIN_DEVICES": str(history.GPUS),
        "PYTHONPATH": str(agent.ROOT),
    }
    with ExitStack() as stack:
        pages = [stack.enter_context(agent.page_server()) for _ in range(history.SERVERS)]
        servers = {f"server-{n}": url for n, url in enumerate(pages)}
        began_s = time.time()
        started = stack.enter_context(agent.agent(folder, servers, environment))
        _until_judged(started, began_s)
        yield started


def _until_judged(started: agent.Started, began_s: float) -> None:
    """The first verdicts are in: until then the agent is busy with them, and the page waits for it.

    By then all was sampled, and GPUs were asked for what is asked in turns. Raises AgentError.
    """
    for _ in range(JUDGED_WITHIN_S):
        if json.loads(started.get("/api/v1/assessment"))["at_unix_s"] >= began_s:
            return
        time.sleep(1)
    raise agent.AgentError(f"no verdict within {JUDGED_WITHIN_S} s")


def measure(folder: Path) -> Figures:
    """Medians, in s: of a range `opens` (every chart but the week's is drawn) and `whole`, and of
    the questions."""
    with running(folder) as started:
        return {**_opened(started), **_asked(started)}


# When the page says so, by its own clock since the navigation: who asks from outside gets a turn
# only between two charts. The frame that follows shows it.
_WATCH = """
window.bench = {};
new MutationObserver(() => requestAnimationFrame(() => {
  for (const mark of ["seen", "ready"]) {
    if (mark in document.documentElement.dataset) bench[mark] ??= performance.now() / 1e3;
  }
})).observe(document, { subtree: true, attributeFilter: ["data-seen", "data-ready"] });
"""
_SHOWN = "new Promise((tell) => setTimeout(() => requestAnimationFrame(() => tell(bench))))"


def _opened(started: agent.Started) -> Figures:
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = defaultdict(list)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        for number, name in itertools.product(range(OPENS + 1), (FIRST, RANGES[-1])):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            page.add_init_script(_WATCH)
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            before_s = agent.look(started.process.pid).cpu_s
            page.goto(f"http://127.0.0.1:{started.port}/" + (f"#range={name}" * (name != FIRST)))
            page.wait_for_selector("html[data-ready]", state="attached")
            shown = page.evaluate(_SHOWN)
            if number:  # the first one warms the browser
                found[f"opens {name}"].append(shown["seen"])
                found[f"whole {name}"].append(shown["ready"])
                cpu_s = agent.look(started.process.pid).cpu_s - before_s
                found[f"cpu whole {name}"].append(cpu_s)
            _check(page, said)
            page.context.close()
        browser.close()
    return {name: statistics.median(times) for name, times in found.items()}


def _check(page: Any, said: list[str]) -> None:
    """Raises AgentError where a chart has nothing to show: a page that is empty is quick."""
    charts = page.evaluate("window.servefitCharts.data()")
    empty = [
        name
        for name, chart in charts.items()
        if not any(v is not None for values in chart["series"].values() for v in values)
    ]
    cells = page.locator("#week td[data-step]").count()
    if len(charts) < 11 or empty or cells != 168 or not page.is_hidden("#trouble"):
        raise agent.AgentError(
            f"of {len(charts)} charts {empty} have no data, the week has {cells} hours;"
            f" {page.inner_text('#trouble')} {said}"
        )


def _asked(started: agent.Started) -> Figures:
    """Of each question the time, and the agent's CPU, which tells it on a busy machine, too."""
    now_s = int(started.status()["now_unix_s"])
    questions = {}
    for name, (length_s, step_s) in zip(RANGES, history.PAGE, strict=True):
        for whose, metrics in (("servers", history.SERVER_METRICS), ("GPUs", history.GPU_METRICS)):
            questions[f"{name}, {whose}"] = (
                f"table?metrics={','.join(metrics)}&from={now_s - length_s:.0f}&to={now_s}"
                f"&step={step_s}"
            )
    questions["verdicts"] = "assessments?changes=true&limit=100"
    for what in ("pattern", "curve"):
        questions[f"{what} of 7 days, one server"] = f"{what}?window=7d&server=server-0"
    figures: Figures = {}
    for name, path in questions.items():
        times, cpu = [], []
        for _ in range(ASKED):
            time.sleep(1.2 * SHARED_S)  # what was read for the last question is forgotten
            before, begin_s = agent.look(started.process.pid).cpu_s, time.perf_counter()
            started.get(f"/api/v1/{path}")
            times.append(time.perf_counter() - begin_s)
            cpu.append(agent.look(started.process.pid).cpu_s - before)
        figures |= {name: statistics.median(times), f"cpu {name}": statistics.median(cpu)}
    return figures


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder)), indent=1))


if __name__ == "__main__":
    sys.exit(main())
