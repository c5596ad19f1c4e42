"""The agent's addresses over a real store: what was planted, and who may not ask for it."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from agent.assess import assess
from agent.config import Agent, Config, Server
from agent.exporters import Batch
from agent.live import GpuStatus, OutboxStatus, ServerStatus, Status, StoreStatus
from agent.minutes import Minute
from agent.model import (
    Confidence,
    Level,
    Recommendation,
    Run,
    Sweep,
    Target,
    UsageError,
    Verdict,
    encode,
)
from agent.recall import Recall
from agent.samplers.watched import SamplerStatus
from agent.terms import FINDINGS, REASONS
from agent.web import answers, app
from agent.web.app import BODY_BYTES_MAX, Site, application
from agent.when import utc
from tests.agent.recorded import NOON, Clocks, counter, gauge, histogram, minute, store

TOKEN = "s3cret-ünlike"
JSON = {"Content-Type": "application/json"}
GZIP = JSON | {"Content-Encoding": "gzip"}
Answer = tuple[int, Any]


class Planted:
    """A running agent whose store and newest samples a test has planted.

    Two servers of two services: `chat` on GPU g0 and `code` on g1, each with ten minutes in the
    store and half a minute that is still open.
    """

    def __init__(self, path: Path) -> None:
        self.clocks = Clocks()
        self.history = store(path, self.clocks)
        self.config = Config(
            server=(Server(name="chat", url="http://chat:8000"), Server(name="code"))
        )
        self.servers = [
            ServerStatus("chat", "http://chat:8000", "front", "vllm", "tiny", ("g0",)),
            ServerStatus("code", "http://code:8000", "back", "vllm", "huge", ("g1",)),
        ]
        self.store = StoreStatus(1000, 0.5, True, False, 0, None)
        self.open: list[Minute] = []
        self.newest: list[Batch] = []
        self.ready = True

    def status(self) -> Status:
        now_s = self.clocks.wall_ns / 1e9
        return Status(
            version="1.2.3",
            now_unix_s=now_s,
            started_unix_s=NOON,
            uptime_s=now_s - NOON,
            samplers=(SamplerStatus("chat", False, 600.0, 0.1, 3, "connection refused"),),
            store=self.store,
            outbox=OutboxStatus(0, 0),
            servers=tuple(self.servers),
            gpus=(GpuStatus("g0", "H100"), GpuStatus("g1", "H100")),
        )

    def batches(self) -> Sequence[Batch]:
        return self.newest

    def is_ready(self) -> bool:
        return self.ready

    def newest_unix_s(self) -> Mapping[str, float]:
        unix_s = self.history.timeline.unix_s
        return {one.source: unix_s(one.readings[-1].at_ns) for one in self.newest}

    def open_minutes(self) -> Sequence[Minute]:
        return self.open

    def fill(self) -> None:
        """2 requests/s, 200 prompt and 40 output tokens/s, 400 W at `chat`; thrice that at `code`;
        4 in flight."""
        for name, service, gpu in (("chat", "front", "g0"), ("code", "back", "g1")):
            self.history.add_source(name, service=service, gpus=[gpu])
        for n in range(10):
            self.clocks.pass_s(60)
            for one in self._minutes(NOON + 60 * n, 60):
                self.history.add_minute(one)
        self.clocks.pass_s(30)
        self.open = self._minutes(NOON + 600, 30)
        reading = self.clocks.reading("requests_running", 4.0)
        self.newest = [Batch(name, [reading]) for name in ("chat", "code")]
        assert self.history.flush()

    @staticmethod
    def _minutes(start_s: int, seconds: float) -> list[Minute]:
        found = []
        for source, times in (("chat", 1), ("code", 3)):
            values = [
                gauge("requests_running", 3.0),
                gauge("requests_waiting", 0.0, 1.0, 2.0),
                gauge("kv_usage_ratio", 0.25),
                counter("requests_received_total", 10**6, 2.0 * times * seconds),
                counter("prompt_tokens_total", 10**6, 200.0 * times * seconds),
                counter("output_tokens_total", 10**6, 40.0 * times * seconds),
            ]
            ttft = histogram("ttft_seconds", 19 * seconds, seconds, 0)
            found.append(minute(start_s, values, [ttft], source=source, covered_s=seconds))
        # the GPUs are sampled each second, so their open minute reaches further
        seconds = min(60, seconds + 3)
        energy = [
            counter("gpu_energy_j", 10**6, 400.0 * times * seconds, gpu=gpu)
            for gpu, times in (("g0", 1), ("g1", 3))
        ]
        return [*found, minute(start_s, energy, source="gpu", covered_s=seconds)]


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    one = Planted(tmp_path / "agent.db")
    one.fill()
    yield one
    one.history.close()


class Client:
    """Asks one agent over its socket; an answer is its status and its JSON."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.ask("GET", path, headers=headers)

    async def ask(self, method: str, path: str, **more: Any) -> Answer:
        async with self.session.request(method, path, **more) as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            text = await answer.text()
            if answer.content_type != "application/json":
                return answer.status, text
            said = json.loads(text)
            if answer.status >= 400 and answer.status != 503:
                assert list(said) == ["error"]
                assert "\n" not in said["error"]
            return answer.status, said


@asynccontextmanager
async def asking(planted: Planted, token: str | None = None, **more: Any) -> AsyncIterator[Client]:
    site = Site()
    url = await site.start(application(planted, token=token, **more), "127.0.0.1:0")
    try:
        async with aiohttp.ClientSession(url) as session:
            yield Client(session)
    finally:
        await site.close()


# ----------------------------------------------------------------------------------------- pattern


@pytest.mark.parametrize(
    ("who", "times", "joules"),
    [("server=chat", 1, 1), ("service=front", 1, 1), ("server=code", 3, 3), ("", 4, 4)],
)
async def test_the_pattern_is_what_was_planted_the_open_minute_included(
    planted: Planted, who: str, times: int, joules: int
) -> None:
    async with asking(planted) as client:
        status, said = await client.get(f"/api/v1/pattern?window=10m&{who}")
    assert status == 200
    assert (said["window_s"], said["gaps_s"]) == (600, 0)
    assert (said["start_unix_s"], said["end_unix_s"]) == (NOON + 30, NOON + 630)
    assert said["requests"] == pytest.approx(1200 * times)
    assert said["prompt_tokens"] == pytest.approx(120_000 * times)
    assert said["output_tokens"] == pytest.approx(24_000 * times)
    servers = 1 if who else 2
    assert said["concurrency"]["mean"] == pytest.approx(4 * servers)
    assert said["concurrency"]["max"] == 5 * servers
    assert said["kv_usage"] == pytest.approx(dict.fromkeys(said["kv_usage"], 0.25))
    assert 0 < said["ttft_ms"]["p50"] < 100 <= said["ttft_ms"]["p99"] <= 500
    assert said["energy"]["energy_j"] == pytest.approx(240_000 * joules)
    assert said["energy_j_per_output_token"] == pytest.approx(10)


async def test_a_server_whose_gpus_are_not_known_has_no_energy(planted: Planted) -> None:
    planted.servers[0] = msgspec.structs.replace(planted.servers[0], gpus=())
    async with asking(planted) as client:
        _, said = await client.get("/api/v1/pattern?server=chat")
        assert said["energy"]["energy_j"] is None
        _, said = await client.get("/api/v1/pattern?window=10m")
    assert said["energy"]["energy_j"] == pytest.approx(960_000)


async def test_an_agent_without_servers_has_seen_nothing(tmp_path: Path) -> None:
    planted = Planted(tmp_path / "agent.db")
    planted.servers = []
    async with asking(planted) as client:
        status, said = await client.get("/api/v1/pattern")
        assert (status, said["requests"], said["gaps_s"]) == (200, None, 3600)
        status, said = await client.get("/api/v1/curve")
        assert (status, said["measured"], said["passive"]["points"]) == (200, None, [])
    planted.history.close()


async def test_a_window_ends_two_intervals_back_where_the_server_is_silent(
    planted: Planted,
) -> None:
    planted.clocks.pass_s(100)
    async with asking(planted) as client:
        _, said = await client.get("/api/v1/pattern?window=10m&server=chat")
    assert said["end_unix_s"] == pytest.approx(NOON + 730 - 10)
    assert said["gaps_s"] == pytest.approx(90)


async def test_a_minute_that_ends_meanwhile_does_not_count_twice(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, asked = answers.seen, []

    def ending(recall: Any, now: answers.Now, *more: Any) -> Any:
        if not asked:  # the minute ends while the store is read
            finished = planted.open
            planted.open = [msgspec.structs.replace(finished[0], start_unix_s=NOON + 660)]
        asked.append(now)
        return honest(recall, now, *more)

    monkeypatch.setattr(answers, "seen", ending)
    async with asking(planted) as client:
        status, _ = await client.get("/api/v1/pattern")
    assert status == 200
    assert [now.open_minutes[0].start_unix_s for now in asked] == [NOON + 600, NOON + 660]


async def test_pattern_and_curve_asked_for_together_read_the_store_once(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, read = answers.seen, []

    def counted(*of: Any) -> Any:
        read.append(of)
        return honest(*of)

    monkeypatch.setattr(answers, "seen", counted)
    async with asking(planted) as client:
        both = [client.get(f"/api/v1/{what}?server=chat") for what in ("pattern", "pattern")]
        (_, one), (_, other) = await asyncio.gather(*both)
        assert one == other
        assert len(read) == 1
        _, code = await client.get("/api/v1/pattern?server=code")
        assert code["servers"] == ["code"]
        assert len(read) == 2


# ------------------------------------------------------------------------------------------ curves


def a_sweep(id_: str, *, url: str = "", model: str = "", engine: str | None = None) -> Sweep:
    levels = [Level(concurrency=n, output_tokens_per_s=100.0 * n) for n in (1, 2)]
    return Sweep(Run(id=id_), Target(url=url, model=model, engine=engine), levels=levels)


async def test_a_curve_comes_in_and_is_the_servers(planted: Planted) -> None:
    async with asking(planted) as client:
        for _ in range(2):  # the same run again is the same curve
            status, said = await client.ask(
                "POST",
                "/api/v1/curve?server=chat",
                data=encode(a_sweep("r1", model="tiny")),
                headers=JSON,
            )
            assert (status, said) == (200, {"id": 1, "levels": 2, "model": "tiny"})
        status, said = await client.get("/api/v1/curve?server=chat&window=10m")
        assert status == 200
        measured = said["measured"]
        assert measured["sweep"]["levels"][1]["output_tokens_per_s"] == 200
        assert (measured["id"], measured["by"]) == (1, "source")
        assert measured["received_unix_s"] == NOON + 630
        (point,) = said["passive"]["points"]
        assert point["concurrency"] == pytest.approx(4)
        assert point["output_tokens_per_s"] == pytest.approx(40)
        _, said = await client.get("/api/v1/curve?server=code")
        assert said["measured"] is None


@pytest.mark.parametrize(
    ("curves", "taken"),
    [
        ([], None),
        ([("old", "chat", "", "tiny"), ("new", "chat", "", "tiny")], ("new", "source")),
        ([("a", "chat", "", "other model")], None),
        ([("own", "chat", "", ""), ("near", None, "http://chat:8000", "tiny")], ("own", "source")),
        ([("a", None, "http://CHAT:8000/v1/", "tiny")], ("a", "url")),
        ([("a", None, "http://chat:8000", "other model")], None),
        ([("a", None, "http://chat:8001", "tiny")], ("a", "model")),
        ([("a", None, "http://[bad", "")], None),
        ([("a", "code", "http://chat:8000", "tiny")], None),
    ],
)
async def test_a_curve_is_shown_where_the_verdict_would_take_it(
    planted: Planted,
    curves: list[tuple[str, str | None, str, str]],
    taken: tuple[str, str] | None,
) -> None:
    planted.history.add_fingerprint("chat", "f", {"model": "tiny"})
    for id_, source, url, model in curves:
        planted.clocks.pass_s(0.1)
        planted.history.add_curve(a_sweep(id_, url=url, model=model), source)
    async with asking(planted) as client:
        _, said = await client.get("/api/v1/curve?server=chat")
    measured = said["measured"]
    assert (measured and (measured["sweep"]["run"]["id"], measured["by"])) == taken
    with Recall(planted.history.path) as recall:
        judged = assess(
            recall,
            server="chat",
            window_s=3600.0,
            slo=(),
            now_s=planted.clocks.wall_ns / 1e9,
            urls={"chat": "http://chat:8000"},
        ).curve
    assert (judged.id, judged.by) == (
        (measured["id"], measured["by"].replace("source", "server")) if measured else (None, None)
    )


@pytest.mark.parametrize(
    ("path", "body", "headers", "expected", "line"),
    [
        ("?server=chat", b"{}", JSON, 400, "not a sweep"),
        ("?server=chat", b"\xff", JSON, 400, "not a sweep"),
        ("?server=chat", b'{"levels": []}', JSON, 400, "no level has both"),
        ("?server=chat", b'{"levels": [], "run": {"id": "\\ud800"}}', JSON, 400, "not a sweep"),
        ("?server=cat", b"{}", JSON, 404, "no server 'cat', nearest is 'chat'"),
        ("?service=front", b"{}", JSON, 400, "unknown parameter 'service'"),
        ("?server=chat", b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
        ("?server=chat", b"{}", JSON | {"Origin": "http://evil.example"}, 403, "origin"),
        ("?server=chat", b"{}", JSON | {"Origin": "null"}, 403, "origin"),
        ("?server=chat", b"{}", JSON | {"Origin": "http://[bad"}, 403, "origin"),
        ("?server=chat", b" " * (BODY_BYTES_MAX + 1), JSON, 413, "more than 16777216"),
        ("?server=chat", gzip.compress(bytes(BODY_BYTES_MAX + 1)), GZIP, 413, "more than"),
        ("?server=chat", b"half a gzip", GZIP, 400, ""),
    ],
)
async def test_what_is_no_curve_is_refused(
    planted: Planted,
    path: str,
    body: bytes,
    headers: dict[str, str],
    expected: int,
    line: str,
) -> None:
    async with asking(planted) as client:
        status, said = await client.ask(
            "POST", f"/api/v1/curve{path}", data=io.BytesIO(body), headers=headers
        )
        assert (status, line in said["error"]) == (expected, True), said
        _, said = await client.get("/api/v1/curve")
    assert said["measured"] is None


async def test_beyond_the_loopback_a_curve_needs_a_token(planted: Planted) -> None:
    planted.config = Config(agent=Agent(listen="0.0.0.0:9477", allow_no_token=True))
    async with asking(planted) as client:
        status, said = await client.ask("POST", "/api/v1/curve", data=b"{}", headers=JSON)
    assert (status, "token" in said["error"]) == (403, True)


async def test_a_page_of_our_own_may_hand_a_curve_over(planted: Planted) -> None:
    async with asking(planted) as client:
        host = client.session._base_url.authority
        status, _ = await client.ask(
            "POST",
            "/api/v1/curve",
            data=encode(a_sweep("r")),
            headers=JSON | {"Origin": f"http://{host}"},
        )
    assert status == 200


# -------------------------------------------------------------------------- series and assessments


async def test_a_series_is_what_agent_query_says(planted: Planted) -> None:
    window = f"from={NOON}&to={utc(NOON + 599)}&step=1m"
    async with asking(planted) as client:
        status, said = await client.get(
            f"/api/v1/series?metric=output_tokens_per_s&server=code&service=&{window}"
        )
        assert status == 200
        assert (said["metric"], said["unit"]) == ("output_tokens_per_s", "{token}/s")
        begun = [[NOON + 60 * n, pytest.approx(120)] for n in range(len(said["points"]))]
        assert (said["points"], len(begun) > 0) == (begun, True)
        _, said = await client.get("/api/v1/series?metric=gpu_power_w&gpu=g1")
        assert said["points"] == []
        _, said = await client.get("/api/v1/series?metric=requests_running&step=10m")
        assert said["points"] == [[NOON, 6.0]]


async def test_a_table_is_several_series_over_the_same_steps(planted: Planted) -> None:
    window = f"from={NOON - 120}&to={NOON + 599}&step=1m"
    names = ("output_tokens_per_s", "kv_usage_ratio", "ttft_p50_ms", "gpu_throttled")
    async with asking(planted) as client:
        status, said = await client.get(
            f"/api/v1/table?metrics={','.join(names)}&server=chat&{window}"
        )
        assert status == 200
        assert (said["from_s"], said["step_s"]) == (NOON - 120, 60)
        assert tuple(said["metrics"]) == names
        for name in names[:3]:
            _, alone = await client.get(f"/api/v1/series?metric={name}&server=chat&{window}")
            points = dict(map(tuple, alone["points"]))
            steps = [points.get(NOON - 120 + 60 * n) for n in range(12)]
            assert said["metrics"][name] == {"unit": alone["unit"], "values": steps}
            assert steps[:2] == [None, None]
            assert None not in steps[2:]
    assert said["metrics"]["ttft_p50_ms"]["values"][5] == pytest.approx(100 * 0.5 * 20 / 19)
    assert said["metrics"]["gpu_throttled"]["values"] == [None] * 12


async def test_a_percentile_stands_in_each_step_of_its_minute(planted: Planted) -> None:
    window = f"from={NOON + 30}&to={NOON + 179}&step=30"
    async with asking(planted) as client:
        _, said = await client.get(f"/api/v1/table?metrics=ttft_p95_ms&{window}")
    values = said["metrics"]["ttft_p95_ms"]["values"]
    assert values == [pytest.approx(100)] * 5


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("series", "parameter 'metric' is missing"),
        ("table", "parameter 'metrics' is missing"),
        (
            "table?metrics=kv_usage_ratio,ttft_p94_ms",
            "no metric 'ttft_p94_ms', nearest is 'ttft_p9",
        ),
        ("table?metrics=" + "a," * 32, "33 metrics: ask for at most 32"),
        ("events?server=chat", "unknown parameter 'server'"),
        ("series?metric=kv_usage", "no metric 'kv_usage', nearest is 'kv_usage_ratio'"),
        ("series?metric=requests_running&server=cat", "no server 'cat', nearest is 'chat'"),
        ("series?metric=requests_running&from=noon", "from 'noon': write an instant"),
        ("series?metric=requests_running&from=9&to=5", "the earlier first"),
        ("series?metric=requests_running&step=0", "step '0': write a time"),
        ("series?metric=requests_running&form=csv", "unknown parameter 'form'"),
        ("series?metric=a&metric=b", "'metric' stands twice"),
        ("pattern?window=soon", "window 'soon': write a time"),
        ("pattern?window=36d", "window '36d': write at most 35d"),
        ("pattern?window=%00%ED%A0%80", "write a time"),
        ("status?verbose=1", "unknown parameter 'verbose'"),
        ("assessments?limit=0", "limit '0'"),
        ("assessments?limit=100000000", "limit '100000000'"),
        ("assessments?limit=%C2%B2", "write a number from 1 to 1000"),
        ("readings?from=1&to=2", "'server' is missing"),
        ("readings?server=chat&from=1", "'to' is missing"),
        (f"readings?server=chat&from={NOON}&to={NOON + 3601}", "at most an hour"),
        (f"readings?server=chat&from={NOON}&to={NOON - 1}", "at most an hour"),
        ("readings?server=chat&from=nan&to=nan", "write an instant"),
    ],
)
async def test_a_question_that_makes_no_sense(planted: Planted, query: str, line: str) -> None:
    async with asking(planted) as client:
        status, said = await client.get(f"/api/v1/{query}")
    assert (status, line in said["error"]) == (400, True), said


@pytest.mark.parametrize(
    "question", ["pattern", "curve", "assessment", "assessments", "readings?from=1&to=2"]
)
async def test_a_server_that_is_none(planted: Planted, question: str) -> None:
    also = "&" if "?" in question else "?"
    async with asking(planted) as client:
        status, said = await client.get(f"/api/v1/{question}{also}server=cat")
    assert (status, said["error"]) == (404, "no server 'cat', nearest is 'chat'")


async def test_assessments_are_told_newest_first(planted: Planted) -> None:
    async with asking(planted) as client:
        status, said = await client.get("/api/v1/assessment?server=chat")
        assert status == 404
        assert "the next one comes at 20" in said["error"]
        for n, scope in enumerate(("chat", "service:front", "chat", "code")):
            planted.clocks.pass_s(1)
            verdict = Verdict(
                "RIGHT_SIZED",
                f"number {n}",
                Confidence("low", "little was seen"),
                recommendation=Recommendation(f"keep {n}"),
            )
            planted.history.add_assessment(scope, verdict)
        assert planted.history.flush()
        status, said = await client.get("/api/v1/assessment?server=chat")
        assert (status, said["scope"], said["finding"]) == (200, "chat", "RIGHT_SIZED")
        assert (said["at_unix_s"], said["verdict"]["summary"]) == (NOON + 633, "number 2")
        assert said["advice"] == [["What to do", "keep 2"]]
        _, said = await client.get("/api/v1/assessments?changes=true&server=chat")
        assert [one["advice"] for one in said] == [[["What to do", "keep 2"]]]
        for question, numbers in {
            "": [3, 2, 1, 0],
            "?limit=2": [3, 2],
            "?server=chat": [2, 0],
            "?service=front": [1],
            "?service=back": [],
        }.items():
            _, said = await client.get(f"/api/v1/assessments{question}")
            assert [one["verdict"]["summary"] for one in said] == [f"number {n}" for n in numbers]


async def test_verdicts_in_a_row_that_say_the_same_are_one_change(planted: Planted) -> None:
    said_in_turn = ("RIGHT_SIZED", "RIGHT_SIZED", "UNDER_SIZED", "RIGHT_SIZED", "RIGHT_SIZED")
    for n, finding in enumerate(said_in_turn):
        for scope in ("chat", "code"):
            planted.clocks.pass_s(1)
            verdict = Verdict(finding, f"{scope} {n}", Confidence("low", "little was seen"))
            planted.history.add_assessment(scope, verdict)
    assert planted.history.flush()
    async with asking(planted) as client:
        _, said = await client.get("/api/v1/assessments?changes=true")
        _, of_chat = await client.get("/api/v1/assessments?changes=true&server=chat&limit=2")
        status, refused = await client.get("/api/v1/assessments?changes=1")
    assert [one["verdict"]["summary"] for one in said] == [
        f"{scope} {n}" for n in (4, 2, 1) for scope in ("code", "chat")
    ]
    begin_s = NOON + 630
    assert [
        (one["finding"], one["since_unix_s"] - begin_s, one["at_unix_s"] - begin_s, one["verdicts"])
        for one in of_chat
    ] == [("RIGHT_SIZED", 7, 9, 2), ("UNDER_SIZED", 5, 5, 1)]
    assert (status, refused) == (400, {"error": "changes '1': write true or false"})


# ---------------------------------------------------------------------------------------- readings


async def test_readings_of_a_server_and_of_its_gpus_come_in_order(planted: Planted) -> None:
    for n in range(4):
        planted.clocks.pass_s(1)
        read = planted.clocks.reading
        gpus = [read("gpu_power_w", 100.0 * n, gpu=gpu) for gpu in ("g0", "g1")]
        planted.history.add_readings("gpu", gpus)
        planted.history.add_readings("chat", [read("kv_usage_ratio", 0.1 * n)])
        planted.history.add_readings("code", [read("kv_usage_ratio", 9.0)])
    begin = NOON + 630
    async with asking(planted) as client:
        path = f"/api/v1/readings?server=chat&from={begin + 2}&to={begin + 3}"
        status, said = await client.get(path)
        assert (status, said["server"], said["now_unix_s"]) == (200, "chat", begin + 4)
        at = [unix_s for unix_s, *_ in said["readings"]]
        assert at == sorted(at)
        assert sorted(said["readings"], key=lambda one: one[:2]) == [
            [at, name, labels, pytest.approx(value)]
            for n, at in ((1, begin + 2), (2, begin + 3))
            for name, labels, value in (
                ("gpu_power_w", {"gpu": "g0"}, 100.0 * n),
                ("kv_usage_ratio", {}, 0.1 * n),
            )
        ]
        planted.servers[0] = msgspec.structs.replace(planted.servers[0], gpus=())
        _, said = await client.get(path)
        assert {labels.get("gpu") for _, _, labels, _ in said["readings"]} == {None, "g0", "g1"}
        _, said = await client.get(f"/api/v1/readings?server=chat&from={NOON - 9}&to={NOON}")
        assert said["readings"] == []


async def test_more_readings_than_fit_are_refused(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "READINGS_MAX", 20)
    monkeypatch.setattr(answers, "_PIECE", 10)
    for _ in range(25):
        planted.clocks.pass_s(1)
        planted.history.add_readings("chat", [planted.clocks.reading("kv_usage_ratio", 0.5)])
    async with asking(planted) as client:
        begin = NOON + 630
        path = f"/api/v1/readings?server=chat&from={begin}&to="
        status, said = await client.get(f"{path}{begin + 25}")
        assert (status, "more than 20 readings" in said["error"]) == (400, True)
        status, said = await client.get(f"{path}{begin + 15}")
        assert (status, len(said["readings"])) == (200, 15)


# ------------------------------------------------------------------------------------------ health


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"writer_lag_s": 29.0}, None),
        ({"error": "database is locked"}, None),
        ({"ready": False}, "being opened"),
        ({"writer_lag_s": 31.0}, "31 s behind"),
        ({"error": "database or disk is full"}, "disk is full"),
        ({"error": "database disk image is malformed"}, "malformed"),
    ],
)
async def test_only_the_store_makes_the_agent_unready(
    planted: Planted, changes: dict[str, Any], reason: str | None
) -> None:
    """The server's sampler fails all the time."""
    planted.store = msgspec.structs.replace(planted.store, **changes)
    async with asking(planted, TOKEN) as client:
        assert await client.get("/livez") == (200, "ok")
        status, said = await client.get("/readyz", Host="somewhere.else")
    assert status == (503 if reason else 200)
    assert said["ready"] is (reason is None)
    assert len(said["reasons"]) == (1 if reason else 0)
    assert reason is None or reason in said["reasons"][0]
    assert said["samplers"] == [{"name": "chat", "ok": False, "age_s": 600.0}]


async def test_an_agent_is_ready_once_its_sources_were_asked(planted: Planted) -> None:
    """Before that it does not know the minute that an earlier agent left unfinished."""
    planted.ready = False
    async with asking(planted) as client:
        assert await client.get("/livez") == (200, "ok")
        status, said = await client.get("/readyz")
        assert (status, said["reasons"]) == (503, ["its sources are asked for the first time"])
        planted.ready = True
        assert (await client.get("/readyz"))[0] == 200


async def test_status_is_the_agents_own(planted: Planted) -> None:
    async with asking(planted) as client:
        status, said = await client.get("/api/v1/status")
    assert (status, said) == (200, json.loads(encode(planted.status())))


async def test_metrics_in_both_formats_and_compressed(planted: Planted) -> None:
    gpus = [planted.clocks.reading("gpu_power_w", 300.0, gpu=f"g{n}") for n in range(30)]
    planted.newest = [Batch("gpu", gpus)]
    line = 'servefit_gpu_power_w{gpu="g7",source="gpu"} 300'
    async with asking(planted) as client:
        async with client.session.get("/metrics", headers={"Accept-Encoding": ""}) as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert "Content-Encoding" not in answer.headers
            plain = await answer.text()
        assert line in plain.splitlines()
        wishes = {"Accept": "application/openmetrics-text", "Accept-Encoding": "br, gzip;q=0.5"}
        async with client.session.get("/metrics", headers=wishes) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            assert answer.headers["Content-Encoding"] == "gzip"
            assert answer.headers["Content-Length"].isdigit()
            assert (await answer.text()).endswith("# EOF\n")


# ------------------------------------------------------------------------------------- who may ask


async def test_a_token_is_needed_where_one_is_configured(planted: Planted) -> None:
    right = {"Authorization": f"Bearer {TOKEN}"}
    async with asking(planted, TOKEN) as client:
        for path in (
            "/metrics",
            "/api/v1/status",
            "/nowhere",
            "/api/v1/table?metrics=kv_usage_ratio",
        ):
            for wrong in (
                {},
                {"Authorization": TOKEN},
                {"Authorization": "Bearer"},
                {"Authorization": f"Bearer {TOKEN}x"},
                {"Authorization": f"Basic {TOKEN}"},
                {"Authorization": "Bearer ÿ"},
            ):
                async with client.session.get(path, headers=wrong) as answer:
                    assert answer.status == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    assert TOKEN not in await answer.text()
            status, said = await client.get(path, Host="agent.example", **right)
            assert status == (404 if path == "/nowhere" else 200)
            assert TOKEN not in str(said)
        status, _ = await client.ask("POST", "/api/v1/curve", data=b"{}", headers=JSON)
        assert status == 401
        status, _ = await client.ask(  # curl's own content type: the token says enough
            "POST",
            "/api/v1/curve",
            data=encode(a_sweep("r")),
            headers=right | {"Content-Type": "application/x-www-form-urlencoded"},
        )
        assert status == 200


@pytest.mark.parametrize(
    ("listen", "host", "expected"),
    [
        ("127.0.0.1:9477", "127.0.0.1", 200),
        ("127.0.0.1:9477", "localhost:1234", 200),
        ("127.0.0.1:9477", "LOCALHOST", 200),
        ("127.0.0.1:9477", "[::1]:9477", 200),
        ("127.0.0.1:9477", "evil.example", 403),
        ("127.0.0.1:9477", "evil.example:9477", 403),
        ("127.0.0.1:9477", "127.0.0.1.evil.example", 403),
        ("127.0.0.1:9477", "10.0.0.7", 403),
        ("127.0.0.1:9477", "", 403),
        ("gpu-7:9477", "gpu-7:9477", 200),
        ("gpu-7:9477", "gpu-8:9477", 403),
        ("0.0.0.0:9477", "10.0.0.7:9477", 200),
        ("[::]:9477", "[fd00::7]", 200),
        ("0.0.0.0:9477", "evil.example", 403),
    ],
)
async def test_no_foreign_name_leads_to_us(
    planted: Planted, listen: str, host: str, expected: int
) -> None:
    planted.config = Config(agent=Agent(listen=listen, allow_no_token=True))
    async with asking(planted) as client:
        for path in ("/api/v1/status", "/livez", "/"):
            status, _ = await client.get(path, Host=host)
            assert status == expected


@pytest.mark.parametrize(
    ("method", "path", "expected", "allowed"),
    [
        ("GET", "/nowhere", 404, None),
        ("GET", "/api/v1/", 404, None),
        ("POST", "/api/v1/status", 405, "GET,HEAD"),
        ("DELETE", "/api/v1/curve", 405, "GET,HEAD,POST"),
        ("PUT", "/metrics", 405, "GET,HEAD"),
        ("GET", "/static/../app.py", 404, None),
        ("GET", "/static/%2e%2e/app.py", 404, None),
        ("GET", "/static/", 403, None),
        ("GET", "/api/v1/status?" + "x" * 2049, 414, None),
    ],
)
async def test_what_is_not_there(
    planted: Planted, method: str, path: str, expected: int, allowed: str | None
) -> None:
    async with asking(planted) as client, client.session.request(method, path) as answer:
        assert answer.status == expected
        assert list(await answer.json()) == ["error"]
        assert answer.headers.get("Allow") == allowed


@pytest.mark.parametrize(
    "line",
    [b"GET /?" + b"x" * 9000 + b" HTTP/1.1", b"\x00\x01", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b"],
)
async def test_what_is_no_http_is_refused_and_leaves_no_trace(
    planted: Planted, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(planted) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.session._base_url.port)
        writer.write(line + b"\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"400"
        writer.close()
        await writer.wait_closed()
        assert await client.get("/livez") == (200, "ok")
    assert caplog.records == []


async def test_the_page_holds_nothing_of_this_agent_and_nothing_inline(planted: Planted) -> None:
    """So it needs no token; what it shows it asks for."""
    async with asking(planted, TOKEN) as client:
        status, page = await client.get("/")
        assert status == 200
        assert "chat" not in page
        assert not re.search(r"<script(?! defer src=)|<style|\sstyle=|\son\w+=", page)
        for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', page):
            status, _ = await client.get(path)
            assert status == 200, path
        _, style = await client.get("/static/servefit.css")
        _, words = await client.get("/static/words.js")
    assert "prefers-color-scheme: dark" in style
    told = json.loads(words[words.index("= {") + 2 : words.rindex(";")])
    assert told["reasons"] == REASONS
    assert {name: tuple(one) for name, one in told["findings"].items()} == FINDINGS


# ------------------------------------------------------------------------------------------ events


async def test_events_say_how_far_the_samples_go(planted: Planted) -> None:
    async with (
        asking(planted, events_every_s=0.01) as client,
        client.session.get("/api/v1/events") as answer,
    ):
        assert answer.content_type == "text/event-stream"
        assert answer.headers["Cache-Control"] == "no-store"
        assert await _event(answer) == {"now_unix_s": NOON + 630, "newest_unix_s": NOON + 630}
        planted.clocks.pass_s(5)
        while (said := await _event(answer))["now_unix_s"] == NOON + 630:
            pass
        assert said == {"now_unix_s": NOON + 635, "newest_unix_s": NOON + 630}


async def _event(answer: aiohttp.ClientResponse) -> Any:
    line = await answer.content.readline()
    assert await answer.content.readline() == b"\n"
    return json.loads(line.removeprefix(b"data: "))


async def test_followers_are_bounded_and_forgotten(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "EVENTS_AT_ONCE_MAX", 1)
    async with asking(planted, events_every_s=0.01) as client:
        async with client.session.get("/api/v1/events") as answer:
            await _event(answer)
            status, said = await client.get("/api/v1/events")
            assert (status, "1 pages follow already" in said["error"]) == (503, True)
        for _ in range(100):  # once the one that was closed is noticed
            async with client.session.get("/api/v1/events") as answer:
                if answer.status == 200:
                    break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("a page that was closed counts for ever")


async def test_a_stream_ends_by_itself_and_with_the_agent(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site()
    url = await site.start(application(planted, token=None, events_every_s=60), "127.0.0.1:0")
    async with aiohttp.ClientSession(url) as session, session.get("/api/v1/events") as answer:
        await _event(answer)
        await asyncio.wait_for(site.close(), 5)
        assert await answer.content.read() == b""
    monkeypatch.setattr(app, "EVENTS_S_MAX", 0.05)
    async with (
        asking(planted, events_every_s=0.01) as client,
        client.session.get("/api/v1/events") as answer,
    ):
        assert 1 <= (await answer.content.read()).count(b"data: ") <= 6


# ------------------------------------------------------------------------------------- a busy store


async def test_questions_wait_their_turn_and_nobody_else_does(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions that do not end hold every thread: the next is told so, the loop goes on."""
    go_on, at_once = threading.Event(), []

    def slow(*_: Any) -> list[Any]:
        at_once.append(threading.current_thread().name)
        go_on.wait(10)
        return []

    monkeypatch.setattr(answers, "assessments", slow)
    async with asking(planted, deadline_s=0.05) as client:
        for _ in range(6):
            status, said = await client.get("/api/v1/assessments")
            assert (status, said["error"][:32]) == (503, "busy: no answer within 0.05 s; a")
        assert len(at_once) == app.AT_ONCE_MAX
        assert await client.get("/livez") == (200, "ok")
        go_on.set()
        monkeypatch.undo()


async def test_a_store_that_is_gone_is_one_line(planted: Planted) -> None:
    planted.history.close()
    planted.history.path.unlink()
    async with asking(planted) as client:
        status, said = await client.get("/api/v1/series?metric=requests_running")
    assert status == 503
    assert "no agent has written" in said["error"]


async def test_a_defect_tells_where_and_not_what(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError(TOKEN)

    monkeypatch.setattr(answers, "assessments", broken)
    async with asking(planted) as client:
        status, said = await client.get("/api/v1/assessments")
    assert status == 500
    assert said["error"].startswith("a defect of servefit: RuntimeError at test_app.py:")
    assert TOKEN not in said["error"]


# ---------------------------------------------------------------------------------------- the site


async def test_an_address_that_is_taken_is_one_line(planted: Planted) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        site = Site()
        with pytest.raises(UsageError, match=rf"^\[agent\] listen {listen}: .*give another"):
            await site.start(application(planted, token=None), listen)
        await site.close()


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:70000"])
async def test_an_address_that_is_none_is_one_line(planted: Planted, listen: str) -> None:
    site = Site()
    with pytest.raises(UsageError, match=r"write it as 127\.0\.0\.1:9477"):
        await site.start(application(planted, token=None), listen)


async def test_it_listens_on_ipv6_and_closes_twice(planted: Planted) -> None:
    site = Site()
    url = await site.start(application(planted, token=None), "[::1]:0")
    assert url.startswith("http://[::1]:")
    async with aiohttp.ClientSession() as session, session.get(f"{url}/livez") as answer:
        assert await answer.text() == "ok"
    await site.close()
    await site.close()
