"""A remote agent: its readings in the levels, by its own clock, and the curve in its hands."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import loadgen
from agent.model import Sweep, TargetError, UsageError, decode_sweep
from loadgen import remote, session
from loadgen.outcome import exit_code
from loadgen.remote import Agent, AgentError, Server, choose
from tests.e2e.misbehaving import Writer, good, message, serving

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
SMALL = {"input_tokens": 16, "output_tokens": 3, "requests": 8, "db": False}
AHEAD_S = 100.0  # the agent's clock is wrong by so much
STEP_S = 0.02
POWER_W = 300.0
KV_USAGE = 0.25
UUID = "GPU-1"
TOKEN = "token-of-the-agent"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("OPENAI_API_KEY", "SERVEFIT_AGENT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "POLL_S", STEP_S)
    monkeypatch.setattr(remote, "PATIENCE_S", 1.0)
    monkeypatch.setattr(session, "SETTLE_S", 0.1)


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "loadgen")
    return lambda: [
        one.getMessage().removeprefix("note: ")
        for one in caplog.records
        if one.getMessage().startswith("note: ")
    ]


@dataclass
class Fake:
    """An agent whose samples are functions of its own clock; `answers` replace pages of it."""

    servers: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"name": "chat", "url": "http://127.0.0.1:8000", "model": "tiny", "engine": "vllm",
             "gpus": [UUID]},
        ]
    )  # fmt: skip
    gpus: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"uuid": UUID, "name": "NVIDIA H100", "memory_total_bytes": 80 * 2**30},
            {"uuid": "GPU-2", "name": "NVIDIA T4", "memory_total_bytes": None},
        ]
    )
    token: str | None = None
    ahead_s: float = AHEAD_S
    running: float = 0.0
    ends_at: float = float("inf")  # no samples after it
    answers: dict[str, web.Response] = field(default_factory=dict)
    asked: list[web.Request] = field(default_factory=list)
    taken: list[Sweep] = field(default_factory=list)
    url: str = ""

    def now(self) -> float:
        return time.time() + self.ahead_s

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "a token is needed"}, status=401)
        page = request.path.removeprefix("/api/v1/")
        if page in self.answers:
            given = self.answers[page]
            return web.Response(status=given.status, body=given.body, headers=given.headers)
        if page == "status":
            return web.json_response(
                {"version": "0", "now_unix_s": self.now(), "uptime_s": 9, "servers": self.servers,
                 "gpus": self.gpus, "samplers": []}
            )  # fmt: skip
        assert request.query["server"] in {server["name"] for server in self.servers}
        if page == "readings":
            begin, end = float(request.query["from"]), float(request.query["to"])
            rows = self.rows(begin, min(end, self.now(), self.ends_at))
            return web.json_response(
                {"server": "chat", "now_unix_s": self.now(), "readings": list(rows)}
            )
        assert (page, request.method, request.content_type) == ("curve", "POST", "application/json")
        self.taken.append(decode_sweep(await request.read()))
        return web.json_response({"id": 7, "levels": 1, "model": "tiny"})

    def rows(self, begin: float, end: float) -> Iterator[list[Any]]:
        for step in range(int(begin / STEP_S) + 1, int(end / STEP_S) + 1):
            at = step * STEP_S
            for uuid, factor in ((UUID, 1.0), ("GPU-2", 2.0)):
                gpu = {"gpu": uuid}
                yield [at, "gpu_energy_j", gpu, factor * POWER_W * (at - 1.7e9)]
                yield [at, "gpu_memory_used_bytes", gpu, at]  # so that a maximum tells its instant
            yield [at, "requests_running", {}, self.running]
            yield [at, "requests_waiting", {}, None]  # a NaN of the server's page
            yield [at, "kv_usage_ratio", {}, KV_USAGE]
            yield [at, "requests_finished_total", {}, 1000 * step]
            yield [at, "ttft_seconds_bucket", {"le": "0.1"}, step]


@asynccontextmanager
async def an_agent(**how: Any) -> AsyncIterator[Fake]:
    fake = Fake(**how)
    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/{path:.*}", fake.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with serving() as address:
        yield f"http://{address}"


# ----------------------------------------------------------------------------------------- levels


async def test_levels_have_what_the_agent_saw_and_the_agent_has_the_curve(
    target: str, notes: Callable[[], list[str]]
) -> None:
    async with an_agent() as fake:
        result = await loadgen.sweep_async(target, concurrency=[1, 2], agent=fake.url, **SMALL)
    assert [(gpu.name, gpu.uuid) for gpu in result.target.gpus] == [("NVIDIA H100", UUID)]
    assert (result.target.engine, result.target.gpu_note) == ("vllm", None)
    for level in result.levels:
        [gpu] = level.gpu
        assert gpu.uuid == UUID
        assert gpu.power_w_mean == pytest.approx(POWER_W, rel=1e-3)
        assert level.duration_s is not None
        assert gpu.energy_j == pytest.approx(POWER_W * level.duration_s, rel=0.02)
        assert level.energy_j_per_output_token == pytest.approx(gpu.energy_j / (8 * 3), rel=0.02)
        assert level.server is not None
        assert (level.server.kv_usage_max, level.server.running_max) == (KV_USAGE, 0)
        # At the agent's interval nobody can say whose the requests were.
        assert level.server.requests_total is None
        assert level.measurement is not None
        assert level.measurement.foreign_requests is None
    assert fake.taken == [result]
    said = notes()
    assert any(
        re.match(rf"from the agent {fake.url}: 1 GPU and the server's series \(.*404.*\) of chat "
                 r"\(http://127.0.0.1:8000, the only server that it watches\)", one)
        for one in said
    ), said  # fmt: skip
    assert f"the agent {fake.url} has the curve, as one of chat" in said


async def test_tokens_of_known_gpus_have_a_price(target: str, tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(
        '[gpu.L4]\nusd_per_hour = 3.6\nas_of = "2026-05-31"\nsource = "an offer"\n', "utf-8"
    )
    async with an_agent() as fake:
        fake.gpus[0]["name"] = "NVIDIA L4"
        result = await loadgen.run_async(target, agent=fake.url, prices=str(prices), **SMALL)
        unpriced = await loadgen.run_async(target, agent=fake.url, slo="e2e:p95<1us", **SMALL)
    [level] = result.levels
    rate = level.output_tokens_per_s
    assert rate
    assert level.cost_usd_per_million_output_tokens == pytest.approx(1000 / rate)
    assert result.verdict is not None
    assert result.verdict.cost["prices"] == "an offer (2026-05-31)"
    assert result.verdict.cost["usd_per_month"]["typical"] == pytest.approx(3.6 * 730)
    assert unpriced.levels[0].cost_usd_per_million_output_tokens is None  # none met the SLO


async def test_the_agents_clock_is_reckoned_with(target: str) -> None:
    async with an_agent() as fake:
        result = await loadgen.run_async(target, agent=fake.url, **SMALL)
        ended = fake.now()
    [level] = result.levels
    [gpu] = level.gpu
    assert gpu.memory_used_bytes_max is not None
    # The first sample after its end is the last that a level is made of.
    assert 0 <= ended - gpu.memory_used_bytes_max < 0.5
    before = [one for one in fake.asked if "from" in one.query]
    assert all(float(one.query["to"]) <= ended + remote.AHEAD_S + 0.1 for one in before)


async def test_the_targets_own_page_comes_first(
    notes: Callable[[], list[str]],
) -> None:
    page = (GOLDEN / "vllm-0.32.0-drained.txt").read_bytes()
    with serving(pages={"/metrics": message(200, page, "text/plain")}) as address:
        async with an_agent() as fake:
            result = await loadgen.run_async(f"http://{address}", agent=fake.url, **SMALL)
    [level] = result.levels
    assert level.server is not None
    assert level.server.kv_usage_max != KV_USAGE
    assert level.server.kv_capacity_tokens == 524288
    assert result.target.settings["vllm:cache_config_info.block_size"]
    assert level.measurement is not None
    assert level.measurement.foreign_requests == 0
    assert [gpu.uuid for gpu in level.gpu] == [UUID]
    assert any(": 1 GPU of chat (" in one for one in notes())


async def test_gpus_that_are_nobodys_are_all_counted(
    target: str, notes: Callable[[], list[str]]
) -> None:
    async with an_agent() as fake:
        fake.servers[0]["gpus"] = []
        result = await loadgen.run_async(target, agent=fake.url, **SMALL)
    assert [gpu.uuid for gpu in result.levels[0].gpu] == [UUID, "GPU-2"]
    assert len(result.target.gpus) == 2
    assert "all 2 GPUs that the agent sees are counted as the target's" in notes()


async def test_an_agent_without_gpus(target: str) -> None:
    async with an_agent() as fake:
        fake.servers[0]["gpus"], fake.gpus = [], []
        result = await loadgen.run_async(target, agent=fake.url, **SMALL)
    assert (result.levels[0].gpu, result.target.gpus) == ([], [])
    assert result.target.gpu_note == "the agent sees none"
    assert result.levels[0].server is not None


async def test_behind_a_simulated_engine_there_is_no_gpu() -> None:
    listed = {"object": "list", "data": [{"id": "tiny", "owned_by": "servefit-sim"}]}
    with serving(pages={"/v1/models": message(200, listed)}) as address:
        async with an_agent() as fake:
            result = await loadgen.run_async(f"http://{address}", agent=fake.url, **SMALL)
    assert (result.levels[0].gpu, result.target.gpus) == ([], [])
    assert result.target.gpu_note == "simulated: there is no GPU behind these numbers"
    assert fake.taken == [result]


async def test_a_long_level_is_asked_for_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    async with an_agent() as fake:
        agent = Agent(fake.url)
        await agent.meet("http://127.0.0.1:8000", "tiny")
        end_ns = time.monotonic_ns()
        start_ns = end_ns - 10**9
        whole = await agent.readings(start_ns, end_ns, lambda: False)
        monkeypatch.setattr(remote, "PIECE_S", 0.25)
        fake.asked.clear()
        pieces = await agent.readings(start_ns, end_ns, lambda: False)
    assert len(fake.asked) > 4
    assert agent.notes == []
    inside = [
        {(one.name, one.value) for one in readings if start_ns <= one.at_ns < end_ns}
        for readings in (whole, pieces)
    ]
    assert inside[0] == inside[1]
    assert len(inside[0]) >= 2 * (1 / STEP_S - 2)
    assert {one.name for one in pieces} == {"gpu_energy_j", "gpu_memory_used_bytes"}
    assert len({(one.at_ns, one.name) for one in pieces}) == len(pieces)  # none twice


# --------------------------------------------------------------------------------------- bad days


async def test_an_agent_that_dies_costs_its_readings_alone(
    notes: Callable[[], list[str]],
) -> None:
    async with an_agent() as fake:

        async def reply(number: int, out: Writer) -> None:
            if number >= 8:  # in the second level
                gone = web.Response(status=502, text="Bad Gateway")
                fake.answers = {"status": gone, "readings": gone, "curve": gone}
            await good(number, out)

        with serving(reply) as address:
            result = await loadgen.sweep_async(
                f"http://{address}", concurrency=[1, 2], agent=fake.url, **SMALL
            )
    first, second = result.levels
    assert first.gpu
    assert (second.gpu, second.server, second.energy_j_per_output_token) == ([], None, None)
    assert exit_code(result) in (0, 3)  # 3: a busy machine, and the level says so
    said = notes()
    assert f"nothing of the agent in this level: {fake.url}/api/v1/status answered 502" in said
    [refused] = [one for one in said if one.startswith("the agent has not the curve")]
    run = result.run.id
    assert refused.endswith(
        f"answered 502; `loadgen export {run} -o {run}.json` here, then "
        f"`agent import {run}.json --server chat` there"
    )


async def test_a_curve_that_is_refused(target: str, notes: Callable[[], list[str]]) -> None:
    async with an_agent() as fake:
        fake.answers["curve"] = web.json_response({"error": "the disk is full"}, status=503)
        result = await loadgen.run_async(target, agent=fake.url, **SMALL)
    assert exit_code(result, single=True) in (0, 3)
    assert result.levels[0].gpu
    [said] = [one for one in notes() if "has not the curve" in one]
    assert "answered 503 (the disk is full); `loadgen export" in said


async def test_an_agent_that_lags_is_waited_for_and_told_of(
    target: str, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.1)
    async with an_agent() as fake:
        fake.ends_at = fake.now()
        result = await loadgen.run_async(target, agent=fake.url, **SMALL)
    assert result.levels[0].gpu[0].energy_j is None  # too little of the level is covered
    assert (
        "the agent has no sample of the GPUs and the server from after the level's end: "
        "what it saw of the level may end too early"
    ) in notes()


async def test_a_clock_that_is_set_makes_instants_incomparable(
    notes: Callable[[], list[str]],
) -> None:
    async with an_agent() as fake:

        async def reply(number: int, out: Writer) -> None:
            fake.ahead_s = AHEAD_S - 3600
            await good(number, out)

        with serving(reply) as address:
            result = await loadgen.run_async(f"http://{address}", agent=fake.url, **SMALL)
    assert result.levels[0].gpu == []
    said = "nothing of the agent in this level: its clock and ours moved -3600.0 s against each"
    assert any(one.startswith(said) for one in notes())


async def test_ctrl_c_hands_over_what_was_measured() -> None:
    async with an_agent() as fake:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def reply(number: int, out: Writer) -> None:
            if number == 6:
                loop.call_soon_threadsafe(begun.set)
            await good(number, out)

        with serving(reply) as address:
            many = {**SMALL, "requests": 100_000}
            task = asyncio.create_task(
                loadgen.run_async(f"http://{address}", agent=fake.url, **many)
            )
            await asyncio.wait_for(begun.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    [sweep] = fake.taken
    assert sweep.run.interrupted
    assert sweep.levels[0].gpu


async def test_a_busy_server_that_only_the_agent_sees(target: str) -> None:
    async with an_agent(running=3.0) as fake:
        with pytest.raises(UsageError, match="the server is busy: 3 requests running, 0 waiting"):
            await loadgen.run_async(target, agent=fake.url, **SMALL)


HTML = web.Response(text="<!doctype html><h1>Welcome</h1>", content_type="text/html")


def json_of(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (HTML, "/api/v1/status answers HTML: check the host and port of --agent"),
        (json_of("{}"), "answers something else than an agent does"),
        (json_of('{"now_unix_s": "x", "servers": [], "gpus": []}'), "something else than an agent"),
        (json_of('{"now_unix_s": 1e300, "servers": [], "gpus": []}'), "something else than an"),
        (json_of("[" * 5_000), "something else than an agent does"),
        (json_of(" " * 20_000 + "{}"), "more than 10000 bytes, which is no agent's answer"),
        (web.Response(status=404, text="not found"), "404: there is no agent, or an older one"),
        (web.Response(status=302, headers={"Location": "/login"}), "302, a redirect, which is not"),
        (web.Response(status=500, text='{"error": "a\\u001b[31m"}'), "answered 500 (a"),
    ],
)
async def test_what_is_no_agent_is_found_out_before_the_first_level(
    target: str, answer: web.Response, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ANSWER_BYTES_MAX", 10_000)
    async with an_agent() as fake:
        fake.answers["status"] = answer
        with pytest.raises(TargetError, match=re.escape(said)) as caught:
            await loadgen.run_async(target, agent=fake.url, **SMALL)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "answer",
    [
        HTML,
        json_of("[]"),
        json_of('{"readings": [[1, "gpu_energy_j", {"gpu": "GPU-1"}, "many"]]}'),
        json_of('{"readings": [[1e999, "gpu_energy_j", {"gpu": "GPU-1"}, 1]]}'),
        json_of('{"readings": [[1, "gpu_energy_j"]]}'),
        json_of('{"readings": [[1, "gpu_energy_j", {"gpu": {}}, 1]]}'),
        json_of('{"readings": {}}'),
    ],
)
async def test_readings_that_are_none_are_a_note(
    target: str, answer: web.Response, notes: Callable[[], list[str]]
) -> None:
    async with an_agent() as fake:
        fake.answers["readings"] = answer
        result = await loadgen.run_async(target, agent=fake.url, **SMALL)
    assert result.levels[0].gpu == []
    assert result.levels[0].measurement is not None
    [said] = [one for one in notes() if one.startswith("nothing of the agent")]
    assert "/api/v1/readings answers" in said


async def test_nobody_there(target: str) -> None:
    with pytest.raises(AgentError, match=r":9/api/v1/status: connection refused; is the agent"):
        await loadgen.run_async(target, agent="http://127.0.0.1:9", **SMALL)


# ------------------------------------------------------------------------------------------ token


async def test_the_token_is_sent_and_shown_nowhere(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], list[str]]
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    kept = tmp_path / "runs.db"
    async with an_agent(token=TOKEN) as fake:
        with pytest.raises(TargetError, match=r"401 .*: give its token by --agent-token-file or"):
            await loadgen.run_async(target, agent=fake.url, **SMALL)
        how: dict[str, Any] = SMALL | {"db": kept, "agent_token_file": file}
        result = await loadgen.run_async(target, agent=fake.url, **how)
        monkeypatch.setenv("SERVEFIT_AGENT_TOKEN", TOKEN)
        await loadgen.run_async(target, agent=fake.url, **SMALL)
        monkeypatch.setenv("SERVEFIT_AGENT_TOKEN", "another")
        with pytest.raises(TargetError, match=r"401 .*: this token is not the agent's"):
            await loadgen.run_async(target, agent=fake.url, **SMALL)
    assert len(fake.taken) == 2
    assert result.levels[0].gpu
    assert TOKEN.encode() not in kept.read_bytes()
    assert not [one for one in notes() if TOKEN in one]


# ----------------------------------------------------------------------------------------- choice

CHAT = Server("chat", "http://127.0.0.1:8000/v1", "tiny")
CODE = Server("code", "http://gpu-2:8000", "coder")
AGENT = "http://gpu-1:9477"


@pytest.mark.parametrize(
    ("servers", "named", "target_url", "model", "chosen", "why"),
    [
        ((CHAT, CODE), "code", "http://gpu-1:8000", "tiny", "code", ""),
        ((CHAT, CODE), None, "http://gpu-1:8000", "x", "chat", ""),  # local to the agent
        ((CHAT, CODE), None, "http://gpu-2:8000/v1", "x", "code", ""),
        ((CHAT, CODE), None, "http://gpu-3:8000", "coder", "code", "the only one with this model"),
        ((CHAT,), None, "http://gpu-3:8000", "x", "chat", "the only server that it watches"),
        ((Server("odd", "http://[", "tiny"), CHAT), None, "http://gpu-1:8000", "", "chat", ""),
    ],
)
def test_which_server_is_the_target(
    servers: tuple[Server, ...], named: str | None, target_url: str, model: str, chosen: str,
    why: str,
) -> None:  # fmt: skip
    found, said = choose(servers, named=named, target_url=target_url, model=model, agent=AGENT)
    assert (found.name, said) == (chosen, why)


def test_a_tunnel_to_both_ends_at_the_same_server() -> None:
    found, why = choose(
        (CHAT, CODE), named=None, target_url="http://localhost:8000", model="x",
        agent="http://[::1]:9477",
    )  # fmt: skip
    assert (found, why) == (CHAT, "")


@pytest.mark.parametrize(
    ("servers", "named", "model", "said"),
    [
        ((), None, "tiny", "watches no server: name the target's in a [[server]]"),
        (
            (CHAT, CODE),
            "chta",
            "tiny",
            "knows no server 'chta': chat (http://127.0.0.1:8000/v1), code",
        ),
        ((CHAT, CODE), None, "x", "is http://gpu-3:8000? Add ?server=NAME to --agent: chat (http"),
        ((CHAT, Server("b", model="tiny")), None, "tiny", "Add ?server=NAME to --agent"),
    ],
)
def test_a_choice_that_cannot_be_made(
    servers: tuple[Server, ...], named: str | None, model: str, said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        choose(servers, named=named, target_url="http://gpu-3:8000", model=model, agent=AGENT)
