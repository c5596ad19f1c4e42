"""ServerSampler against a real HTTP server that serves good pages and every kind of bad one."""

from __future__ import annotations

import asyncio
import gzip
import re
import resource
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from agent.samplers import SamplerError
from agent.samplers.server import ServerSampler

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
BUSY = (GOLDEN / "vllm-0.32.0-busy.txt").read_bytes()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}/metrics"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw(answer: bytes) -> AsyncIterator[str]:
    """A server that writes these bytes and hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
    finally:
        server.close()
        await server.wait_closed()


def page(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers=headers)

    return handle


async def failure(handler: Handler, **options: float) -> str:
    """The one line that a scrape of such a server ends in."""
    async with serving(handler) as url:
        return await failure_of(url, **options)


async def failure_of(url: str, **options: float) -> str:
    sampler = ServerSampler(url, **{"timeout_s": 5.0, **options})  # type: ignore[arg-type]
    with pytest.raises(SamplerError) as caught:
        await sampler.sample()
    await sampler.close()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(url.partition("?")[0])
    return text.removeprefix(url).removeprefix(": ")


async def test_a_real_page() -> None:
    asked = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(dict(request.headers))
        return web.Response(body=BUSY)

    async with serving(handle) as url:
        sampler = ServerSampler(url, headers={"Authorization": "Bearer key"}, model="tiny")
        before = time.monotonic_ns()
        first, second = await sampler.sample(), await sampler.sample()
        after = time.monotonic_ns()
        await sampler.close()
        await sampler.close()
    assert {one.name: one.value for one in first}["requests_running"] == 48
    assert before < first[0].at_ns < second[0].at_ns < after
    assert (sampler.engine, sampler.malformed, sampler.page_bytes) == ("vllm", 0, len(BUSY))
    assert asked[0]["Authorization"] == "Bearer key"
    assert asked[0]["Accept-Encoding"] == "identity"  # the server's CPU is being measured


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BUSY)),
        ("GZIP", gzip.compress(BUSY)),
        ("deflate", zlib.compress(BUSY)),
        ("identity", BUSY),
    ],
)
async def test_compressed_although_nobody_asked(encoding: str, body: bytes) -> None:
    async with serving(page(body, headers={"Content-Encoding": encoding})) as url:
        sampler = ServerSampler(url)
        readings = await sampler.sample()
        await sampler.close()
    assert len(readings) == 33


HTML = b"<!doctype html><html><body>vllm:num_requests_running 3</body></html>"


@pytest.mark.parametrize(
    ("handler", "line"),
    [
        (page(HTML), "not a Prometheus page (HTML or XML)"),
        (page(b"\n " + HTML), "not a Prometheus page (HTML or XML)"),
        (page(HTML * 10_000), "not a Prometheus page (HTML or XML)"),
        (page(b'{"detail": "Not Found"}'), "not a Prometheus page (JSON)"),
        (page(b""), "not a Prometheus page (nothing on it)"),
        (page(b"\n\n"), "not a Prometheus page (nothing on it)"),
        (page(b"# HELP up Up.\nup 1\n"), "a metrics page, but of no server known here"),
        (page(b"", 401), "HTTP 401, the page wants credentials"),
        (page(b"", 403), "HTTP 403, the credentials given are not allowed to read the page"),
        (page(b"", 404), "HTTP 404, there is no metrics page at this address"),
        (page(b"", 503), "HTTP 503"),
        (
            page(b"", 302, {"Location": "http://u:secret@elsewhere/login?token=secret"}),
            "HTTP 302, moved to http://elsewhere/login; redirects are not followed",
        ),
        (
            page(b"", 307, {"Location": "/metrics/"}),
            "HTTP 307, moved to http://127.0.0.1:PORT/metrics/; redirects are not followed",
        ),
        (page(b"", 302), "HTTP 302, moved to nowhere; redirects are not followed"),
        (page(BUSY[:-5]), "the page is cut short"),
        (
            page(b"no such thing", headers={"Content-Encoding": "gzip"}),
            "the compressed page is broken: Error -3 while decompressing data: "
            "incorrect header check",
        ),
        (
            page(gzip.compress(BUSY)[:-200], headers={"Content-Encoding": "gzip"}),
            "the compressed page is cut short",
        ),
        (
            page(BUSY, headers={"Content-Encoding": "br"}),
            "compressed as 'br', which was not asked for",
        ),
    ],
)
async def test_what_is_not_a_page(handler: Handler, line: str) -> None:
    said = await failure(handler)
    assert re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", said) == line


async def test_other_models_page() -> None:
    two = b'vllm:prompt_tokens{model_name="a"} 1\nvllm:prompt_tokens{model_name="b"} 2\n'
    async with serving(page(two)) as url:
        sampler = ServerSampler(url, model="c")
        with pytest.raises(SamplerError, match="speaks of a, b, but not of c"):
            await sampler.sample()
        await sampler.close()


async def test_a_page_without_end() -> None:
    sent = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(BUSY)
            sent += len(BUSY)

    assert await failure(handle, max_bytes=500_000) == (
        "more than 500000 bytes, which is no server's page"
    )
    assert sent < 20_000_000  # it was not read on


async def test_a_gzip_bomb_stalls_nobody() -> None:
    bomb = gzip.compress(b"# " + b" " * 200_000_000, 1)
    late_s = 0.0

    async def ticking() -> None:
        nonlocal late_s
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            late_s = max(late_s, time.monotonic() - began - 0.001)

    ticker = asyncio.create_task(ticking())
    text = await failure(page(bomb, headers={"Content-Encoding": "gzip"}))
    ticker.cancel()
    assert text == "more than 16777216 bytes, which is no server's page"
    assert late_s < 0.25  # 2 ms on an idle machine; whole, it would be a second


async def test_byte_by_byte_ends_at_the_deadline() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for at in range(len(BUSY)):
            await response.write(BUSY[at : at + 1])
            await asyncio.sleep(0.01)
        return response

    began = time.monotonic()
    assert await failure(handle, timeout_s=0.3) == "no page within 0.3 s"
    assert time.monotonic() - began < 2


async def test_never_two_at_once_and_well_again_after() -> None:
    release = asyncio.Event()
    asked = 0

    async def handle(_: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        await release.wait()
        return web.Response(body=BUSY)

    async with serving(handle) as url:
        sampler = ServerSampler(url)
        first = asyncio.create_task(sampler.sample())
        await asyncio.sleep(0.1)
        with pytest.raises(SamplerError, match="the last scrape has not ended yet"):
            await sampler.sample()
        assert asked == 1
        release.set()
        assert len(await first) == 33
        assert len(await sampler.sample()) == 33
        await sampler.close()


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (b"", "the server closed the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + BUSY, "the page is cut short"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nup 1\r\n",
            "the page is cut short",
        ),
        (b"HTTP/1.0 200 OK\r\n\r\n" + BUSY[:30_001], "the page is cut short"),
    ],
)
async def test_half_an_answer(answer: bytes, line: str) -> None:
    async with raw(answer) as url:
        assert await failure_of(url) == line


async def test_an_answer_that_ends_with_the_connection() -> None:
    async with raw(b"HTTP/1.0 200 OK\r\n\r\n" + BUSY) as url:
        sampler = ServerSampler(url)
        assert len(await sampler.sample()) == 33
        await sampler.close()


async def test_what_is_not_http() -> None:
    async with raw(b"SSH-2.0-OpenSSH_9.2\r\n") as url:
        assert await failure_of(url)


async def test_nobody_there() -> None:
    async with raw(b"") as url:
        pass
    assert await failure_of(url) == "connection refused"


async def test_secrets_stay_out_of_errors() -> None:
    sampler = ServerSampler("http://user:hunter2@127.0.0.1:9/metrics?token=hunter2")
    with pytest.raises(SamplerError) as caught:
        await sampler.sample()
    await sampler.close()
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).startswith("http://127.0.0.1:9/metrics: ")


@pytest.mark.parametrize("url", ["", "nonsense", "http://", "http://[", "ftp://x/metrics"])
async def test_addresses_that_are_none(url: str) -> None:
    sampler = ServerSampler(url)
    with pytest.raises(SamplerError):
        await sampler.sample()
    await sampler.close()


async def test_json_of_the_same_server() -> None:
    async with serving(page(b'{"version": "0.32.0"}')) as url:
        sampler = ServerSampler(url)
        assert await sampler.get_json(url) == {"version": "0.32.0"}
        await sampler.close()
    async with serving(page(b"<html>")) as url:
        sampler = ServerSampler(url)
        with pytest.raises(SamplerError):
            await sampler.get_json(url)
        await sampler.close()


# ------------------------------------------------------- a bad page, and the next one is good

GOOD = b"vllm:num_requests_running 3\n"


def in_turn(*answers: Handler) -> Handler:
    """One answer after the other; the last one for ever."""
    left = list(answers)

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = left.pop(0) if len(left) > 1 else left[0]
        return await answer(request)

    return handle


def streamed(piece: bytes, times: int, pause_s: float = 0.0) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(times):
            await response.write(piece)
            await asyncio.sleep(pause_s)
        return response

    return handle


def numbered(line: str, times: int) -> bytes:
    return "".join(line % n for n in range(times)).encode()


FOREVER = 10**9
TOO_MUCH = "more than 16777216 bytes, which is no server's page"
BAD_DAYS: dict[str, tuple[Handler, str]] = {
    "huge": (page(b"# " + b"x" * 17_000_000 + b"\n"), TOO_MUCH),
    "endless": (streamed(b"a 1\n" * 16_000, FOREVER), TOO_MUCH),
    "an endless line": (streamed(b"x" * 65_536, FOREVER), TOO_MUCH),
    "a bomb": (
        page(gzip.compress(b"a 1\n" * 10_000_000, 1), headers={"Content-Encoding": "gzip"}),
        TOO_MUCH,
    ),
    "byte by byte": (streamed(b"a", FOREVER, 0.01), "no page within 1 s"),
    "slow": (streamed(GOOD, 2, 30), "no page within 1 s"),
    "half a page": (page(GOOD + b"vllm:num_req"), "the page is cut short"),
    "half a compressed page": (
        page(gzip.compress(BUSY)[:-999], headers={"Content-Encoding": "gzip"}),
        "the compressed page is cut short",
    ),
    "HTML": (page(HTML), "not a Prometheus page (HTML or XML)"),
    "JSON": (page(b'{"models": []}'), "not a Prometheus page (JSON)"),
    "nonsense": (page(bytes(range(256)) * 300 + b"\n"), "of no server known here"),
    "a million series of others": (page(numbered("a%d 1\n", 1_000_000)), "of no server known"),
    "a million series of ours": (
        page(numbered('vllm:prompt_tokens{n="%d"} 1\n', 400_000)),
        "more than 20000 series, which is no server's page",
    ),
    "elsewhere": (page(b"", 302, {"Location": "/elsewhere"}), "HTTP 302, moved to "),
    "credentials": (page(b"", 401), "HTTP 401, the page wants credentials"),
    "not there": (page(b"", 404), "HTTP 404, there is no metrics page at this address"),
    "out of order": (page(b"", 500), "HTTP 500"),
}


@pytest.mark.parametrize("name", BAD_DAYS)
async def test_a_bad_day_is_one_line_and_ends(name: str) -> None:
    bad, line = BAD_DAYS[name]
    # A 404 is asked for Ollama's page too, and then once more for the page itself.
    answers = [bad, bad] if name == "not there" else [bad]
    async with serving(in_turn(*answers, page(GOOD))) as url:
        sampler = ServerSampler(url, timeout_s=1.0 if "no page" in line else 10.0, full=True)
        before_kb = peak_kb()
        began = time.monotonic()
        with pytest.raises(SamplerError) as caught:
            await sampler.sample()
        assert time.monotonic() - began < 12
        assert peak_kb() - before_kb < 64_000
        text = str(caught.value)
        assert "\n" not in text
        assert len(text) < 300
        assert line in text
        assert [(one.name, one.value) for one in await sampler.sample()] == [
            ("requests_running", 3)
        ]
        await sampler.close()


def peak_kb() -> int:
    """The most memory that this process ever had in use."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def test_a_page_with_everything_wrong_but_one_line() -> None:
    text = (
        b'vllm:num_requests_running{a="' + b"x" * 70_000 + b'"} 1\n'  # a very long label
        b"vllm:kv_cache_usage_perc NaN\n"
        b"vllm:prompt_tokens_total +Inf\n"
        b"vllm:num_requests_waiting 1e999\n"
        b"vllm:generation_tokens_total 7\nvllm:generation_tokens_total 8\n"  # the same series twice
        b'vllm:num_preemptions{a="} 3\n'
    )
    async with serving(page(text)) as url:
        sampler = ServerSampler(url, full=True)
        assert [(one.name, one.value) for one in await sampler.sample()] == [
            ("output_tokens_total", 7)
        ]
        assert (sampler.malformed, sampler.duplicates) == (2, 1)
        await sampler.close()


# --------------------------------------------------------------------- beside the metrics page


async def test_full_readings_of_a_vllm() -> None:
    async with serving(page(BUSY)) as url:
        sampler = ServerSampler(url, full=True)
        assert sampler.missing() == []
        first, second = await sampler.sample(), await sampler.sample()
        await sampler.close()
    assert [one.name for one in first] == [one.name for one in second]
    assert {one.name for one in first} >= {"ttft_seconds_bucket", "prompt_length_tokens_bucket"}
    assert len(first) > 200
    assert sampler.missing() == []
    assert dict(sampler.fingerprint)["model"] == "tiny"
    assert 0 < sampler.parse_s < sampler.exchange_s


def by_path(**pages: Handler) -> tuple[Handler, list[str]]:
    """Pages by the last part of their path, and which of them were asked for."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        answer = pages.get(request.path.rpartition("/")[2])
        return await answer(request) if answer else web.Response(status=404)

    return handle, asked


LLAMA = (GOLDEN / "llama.cpp-0c1e57098.txt").read_bytes()
SLOTS = (GOLDEN / "llama.cpp-0c1e57098-slots.json").read_bytes()


async def test_llama_cpp_tells_its_kv_cache_beside() -> None:
    handler, asked = by_path(metrics=page(LLAMA), slots=page(SLOTS))
    async with serving(handler) as url:
        sampler = ServerSampler(url, full=True)
        found = {one.name: one.value for one in await sampler.sample()}
        await sampler.close()
    assert (found["requests_running"], found["kv_used_tokens"]) == (3, 1500)
    assert "kv_usage_ratio" not in {one.canonical for one in sampler.missing()}
    assert asked == ["/metrics", "/slots"]


@pytest.mark.parametrize(
    "slots",
    [
        page(b"", 501),
        page(b"<html>"),
        page(b"x" * 2_000_000),
        page(b'[{"n_ctx": "many"}]'),
        page(b'[{"prompt": ' + b"[" * 500_000),
        streamed(b" ", FOREVER, 0.01),
    ],
)
async def test_without_the_page_beside_there_is_still_the_page(slots: Handler) -> None:
    handler, asked = by_path(metrics=page(LLAMA), slots=slots)
    async with serving(handler) as url:
        sampler = ServerSampler(url, full=True, timeout_s=2)
        first, second = await sampler.sample(), await sampler.sample()
        await sampler.close()
    assert len(first) == len(second) == 12
    assert asked == ["/metrics", "/slots", "/metrics"]  # not asked for again at once
    mends = {one.canonical: one.brings for one in sampler.missing()}
    assert mends["kv_usage_ratio"] == "start it without --no-slots"


async def test_ollama_has_no_metrics_page() -> None:
    handler, asked = by_path(ps=page((GOLDEN / "ollama-ps.json").read_bytes()))
    async with serving(handler) as url:
        sampler = ServerSampler(url, full=True)
        for _ in range(2):
            found = {one.name: one.value for one in await sampler.sample()}
            assert found["model_memory_gpu_bytes"] == 4 * 2**30
        await sampler.close()
    assert sampler.engine == "ollama"
    assert "ttft_seconds" in {one.canonical for one in sampler.missing()}
    assert asked == ["/metrics", "/api/ps", "/api/ps"]


async def test_who_does_not_ask_for_all_asks_for_the_page_only() -> None:
    handler, asked = by_path(metrics=page(LLAMA), slots=page(SLOTS))
    async with serving(handler) as url:
        sampler = ServerSampler(url)
        assert len(await sampler.sample()) == 12
        await sampler.close()
    assert asked == ["/metrics"]


async def test_dynamo_under_another_name_is_read_from_the_first_page() -> None:
    renamed = (GOLDEN / "dynamo-1.6.1-frontend-renamed.txt").read_bytes()
    handler, asked = by_path(metrics=page(renamed))
    async with serving(handler) as url:
        sampler = ServerSampler(url)
        first, second = await sampler.sample(), await sampler.sample()
        await sampler.close()
    assert [one.value for one in first] == [one.value for one in second]
    assert {one.name: one.value for one in first}["requests_running"] == 9
    assert sampler.engine == "dynamo"
    assert len(asked) == 3


async def test_a_server_without_hardware_is_known_by_its_fingerprint() -> None:
    for headers, told in ((None, False), ({"x-servefit-simulated": "1"}, True)):
        async with serving(page(BUSY, headers=headers)) as url:
            sampler = ServerSampler(url)
            await sampler.sample()
            await sampler.close()
        assert sampler.simulated is told
        assert (("servefit.simulated", "1") in sampler.fingerprint) is told
