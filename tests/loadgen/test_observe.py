from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from agent.join import server_view
from agent.model import Reading, UsageError
from agent.samplers import SamplerError
from loadgen import observe
from loadgen.observe import Observer, discover, local_gpus

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
BUSY = (GOLDEN / "vllm-0.32.0-busy.txt").read_bytes()
DRAINED = (GOLDEN / "vllm-0.32.0-drained.txt").read_bytes()


class Scripted:
    """A sampler that answers after `takes_s`, or fails as told."""

    def __init__(self, name: str = "scripted", takes_s: float = 0, error: Exception | None = None):
        self.name = name
        self.error = error
        self.takes_s = takes_s
        self.began: list[float] = []
        self.closed = 0
        self.inside = 0

    async def sample(self) -> Sequence[Reading]:
        self.began.append(time.monotonic())
        self.inside += 1
        assert self.inside == 1, "samples overlap"
        await asyncio.sleep(self.takes_s)
        self.inside -= 1
        if self.error is not None:
            raise self.error
        return [Reading(time.monotonic_ns(), "requests_running", 1.0)]

    async def close(self) -> None:
        self.closed += 1
        if self.error is not None:
            raise self.error


async def test_one_before_one_after_and_one_an_interval() -> None:
    sampler = Scripted()
    observer = Observer([(sampler, 0.1)])
    async with observer.watching():
        began = time.monotonic()
        assert len(observer.readings) == 1
        await asyncio.sleep(0.55)
        ended = time.monotonic()
    assert sampler.began[0] <= began
    assert sampler.began[-1] >= ended
    assert 5 <= len(sampler.began) <= 8
    assert len(observer.readings) == len(sampler.began)
    assert observer.notes == []


async def test_the_shortest_level_has_two_samples() -> None:
    sampler = Scripted()
    observer = Observer([(sampler, 60)])
    began = time.monotonic()
    async with observer.watching():
        pass
    assert len(observer.readings) == 2
    assert time.monotonic() - began < 1


async def test_a_failure_is_noted_and_stops_nobody() -> None:
    well = Scripted("well")
    failing = Scripted("server", error=SamplerError("no page"))
    broken = Scripted("broken", error=RuntimeError("a defect"))
    observer = Observer([(failing, 0.05), (well, 0.05), (broken, 60)])
    async with observer.watching():
        await asyncio.sleep(0.3)
        failing.error = None
    assert len(observer.readings) > len(well.began)  # one came back at the end
    assert observer.notes[0].startswith("server: no page (")
    assert observer.notes[1] == "broken: RuntimeError: a defect (2 times)"
    await observer.close()
    assert (well.closed, failing.closed, broken.closed) == (1, 1, 1)


async def test_each_level_has_its_own_readings() -> None:
    sampler = Scripted(error=SamplerError("not yet"))
    observer = Observer([(sampler, 60)])
    async with observer.watching():
        pass
    first = observer.readings
    assert observer.notes
    sampler.error = None
    async with observer.watching():
        pass
    assert (first, len(observer.readings), observer.notes) == ([], 2, [])


async def test_a_slow_source_is_left_in_peace() -> None:
    sampler = Scripted(takes_s=0.1)
    observer = Observer([(sampler, 0.05)])
    async with observer.watching():
        await asyncio.sleep(1)
    # 0.1 s of work, then at least 0.2 s of rest: at most 4 in the second, and the two at its ends.
    assert 3 <= len(sampler.began) <= 6


async def test_the_sample_under_way_at_the_end_is_waited_for() -> None:
    sampler = Scripted(takes_s=0.2)
    observer = Observer([(sampler, 0.05)])
    async with observer.watching():
        await asyncio.sleep(0.15)
        ended = time.monotonic()
    assert sampler.began[-1] >= ended
    assert len(observer.readings) == len(sampler.began) == 3


async def test_an_interrupted_level_ends_at_once() -> None:
    sampler = Scripted()
    observer = Observer([(sampler, 0.01)])

    async def level() -> None:
        async with observer.watching():
            sampler.takes_s = 60
            await asyncio.sleep(60)

    task = asyncio.create_task(level())
    await asyncio.sleep(0.1)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 1
    assert len(asyncio.all_tasks()) == 1
    assert len(observer.readings) >= 1  # what there is is kept


# ----------------------------------------------------------------------------------------- finding


@asynccontextmanager
async def serving(
    paths: dict[str, bytes], seen: list[web.Request] | None = None
) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.StreamResponse:
        if seen is not None:
            seen.append(request)
        body = paths.get(request.path)
        return web.Response(body=body) if body is not None else web.Response(status=404)

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


VERSION = b'{"version": "0.32.0"}'


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_found_at_the_root(path: str) -> None:
    async with serving({"/metrics": BUSY, "/version": VERSION}) as url:
        sampler, note, engine, version = await discover(url + path)
        assert sampler is not None
        assert sampler.url == url + "/metrics"
        assert (note, engine, version) == (None, "vllm", "0.32.0")
        await sampler.close()


async def test_found_beside_an_api_behind_a_prefix() -> None:
    pages = {"/llm/metrics": BUSY, "/llm/version": VERSION, "/metrics": b"up 1\n"}
    async with serving(pages) as url:
        sampler, _, engine, version = await discover(url + "/llm/v1")
        assert sampler is not None
        assert sampler.url == url + "/llm/metrics"
        assert (engine, version) == ("vllm", "0.32.0")
        await sampler.close()
    async with serving({"/metrics": BUSY}) as url:
        sampler, _, engine, version = await discover(url + "/llm/v1")
        assert sampler is not None
        assert sampler.url == url + "/metrics"
        assert (engine, version) == ("vllm", None)
        await sampler.close()


async def test_not_found_says_why() -> None:
    async with serving({}) as url:
        assert await discover(url) == (
            *(None, f"{url}/metrics: HTTP 404, there is no metrics page at this address"),
            *(None, None),
        )
    sampler, note, _, _ = await discover("http://127.0.0.1:9/v1", "none")
    assert (sampler, note) == (None, "switched off (--metrics-url none)")


@pytest.mark.parametrize("address", ["nonsense", "http://[", "http://", "ftp://x/metrics"])
async def test_an_address_that_is_none_is_wrong_usage(address: str) -> None:
    with pytest.raises(UsageError, match="--metrics-url"):
        await discover("http://127.0.0.1:9/v1", address)


async def test_nobody_there_is_a_note() -> None:
    _, note, _, _ = await discover("http://127.0.0.1:9/v1")
    assert note == "http://127.0.0.1:9/metrics: connection refused"


async def test_the_key_goes_to_the_target_alone() -> None:
    seen: list[web.Request] = []
    headers = {"Authorization": "Bearer key"}
    async with serving({"/metrics": BUSY}, seen) as url:
        for metrics_url in (None, url + "/metrics"):
            sampler, *_ = await discover(url, metrics_url, headers=headers)
            assert sampler is not None
            await sampler.close()
        assert all(one.headers.get("Authorization") == "Bearer key" for one in seen)
        seen.clear()
        sampler, *_ = await discover("http://127.0.0.1:9", url + "/metrics", headers=headers)
        assert sampler is not None
        await sampler.close()
        assert seen
        assert all("Authorization" not in one.headers for one in seen)


async def test_two_real_pages_become_a_level() -> None:
    pages = {"/metrics": BUSY}
    async with serving(pages) as url:
        sampler, *_ = await discover(url, model="tiny")
        assert sampler is not None
        observer = Observer([(sampler, 0.05)])
        start_ns = time.monotonic_ns()
        async with observer.watching():
            await asyncio.sleep(0.2)
            pages["/metrics"] = DRAINED
        view = server_view(
            observer.readings, start_ns=start_ns, end_ns=time.monotonic_ns(), window=None
        )
        await observer.close()
    assert view is not None
    assert (view.running_max, view.requests_total, view.preemptions) == (48, 47, 0)
    assert view.kv_capacity_tokens == 524288
    assert view.queue_ms is not None
    assert view.decode_ms is not None


async def test_a_remote_targets_gpu_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_open_nvml", lambda: pytest.fail("NVML was asked"))
    sampler, note = await local_gpus("http://192.0.2.1:8000/v1")
    assert sampler is None
    assert note == "the target 192.0.2.1 is not on this machine, so this machine's GPU is not its"


async def test_a_local_target_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise SamplerError("no NVIDIA driver on this machine")

    monkeypatch.setattr(observe, "_open_nvml", none)
    assert await local_gpus("http://localhost:8000") == (None, "no NVIDIA driver on this machine")


@pytest.mark.parametrize("url", ["", "/v1", "http://no-such-name.invalid/v1"])
async def test_targets_that_are_nowhere(url: str) -> None:
    sampler, note = await local_gpus(url)
    assert sampler is None
    assert note
