"""The page of dcgm-exporter 4.6, written after its templates (render_metrics.go) and counters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from agent.metrics import CATALOGUE
from agent.model import Reading, TargetGpu
from agent.samplers import SamplerError
from agent.samplers.dcgm import DcgmSampler, empty_page, parse

GOLDEN = Path(__file__).parents[2] / "golden" / "dcgm" / "exporter-4.6.txt"
BUSY = "GPU-7f2c18d4-5a1e-4b0e-9d0c-2a6b1f0c9e11"
IDLE = "GPU-c0a91d7e-0f55-4d1b-8b6a-64d3c2b7a902"
MIG = "GPU-1f027ee8-6e1e-2b8c-0108-3d370e5f0418"
MIB = 1 << 20


def read(text: bytes) -> tuple[list[Reading], list[TargetGpu]]:
    page = empty_page()
    page.feed(text)
    page.end()
    return parse(page, 7)


def values(readings: list[Reading], *labels: tuple[str, str]) -> dict[str, float]:
    return {one.name: one.value for one in readings if one.labels == labels}


def test_a_busy_gpu() -> None:
    readings, _ = read(GOLDEN.read_bytes())
    assert values(readings, ("gpu", BUSY)) == pytest.approx(
        {
            "gpu_energy_j": 1893046158.312,
            "gpu_power_w": 644.286,
            "gpu_power_polled": 1,
            "gpu_temperature_c": 57,
            "gpu_sm_clock_hz": 1.98e9,
            "gpu_memory_clock_hz": 2.619e9,
            "gpu_last_xid": 0,
            "gpu_pcie_replays_total": 3,
            "gpu_ecc_uncorrected_total": 0,
            "gpu_utilization_ratio": 0.99,
            "gpu_memory_busy_ratio": 0.57,
            "gpu_tensor_active_ratio": 0.118406,
            "gpu_dram_active_ratio": 0.838291,
            "gpu_pcie_sent_bytes_per_s": 10523118,
            "gpu_pcie_received_bytes_per_s": 8213004,
            "gpu_memory_used_bytes": 75166 * MIB,
            "gpu_memory_reserved_bytes": 550 * MIB,
            "gpu_memory_total_bytes": 81559 * MIB,
        }
    )
    assert {one.at_ns for one in readings} == {7}
    assert {one.name for one in readings} <= CATALOGUE.keys()


def test_what_dcgm_marks_as_blank_is_no_value() -> None:
    readings, _ = read(GOLDEN.read_bytes())
    idle = values(readings, ("gpu", IDLE))
    assert "gpu_dram_active_ratio" not in idle  # a fraction's mark
    assert "gpu_pcie_sent_bytes_per_s" not in idle  # a whole number's
    assert idle["gpu_tensor_active_ratio"] == 0  # and 0 is a value
    assert idle["gpu_last_xid"] == 79


def test_mig_instances_have_memory_and_their_gpu_the_rest_once() -> None:
    readings, gpus = read(GOLDEN.read_bytes())
    assert values(readings, ("gpu", MIG), ("mig", "3")) == {
        "mig_memory_used_bytes": 19 * MIB,
        "mig_memory_total_bytes": 19970 * MIB,
    }
    assert values(readings, ("gpu", MIG), ("mig", "9"))["mig_memory_used_bytes"] == 3488 * MIB
    whole = [one for one in readings if one.labels == (("gpu", MIG),)]
    assert len({one.name for one in whole}) == len(whole)
    assert values(whole, ("gpu", MIG)) == {
        "gpu_energy_j": pytest.approx(90311478.001),
        "gpu_power_w": 231.4,
        "gpu_power_polled": 1,
        "gpu_temperature_c": 38,
        "gpu_sm_clock_hz": 1.41e9,
        "gpu_memory_clock_hz": 1.593e9,
        "gpu_last_xid": 0,
        "gpu_pcie_replays_total": 0,
    }
    assert gpus == [
        TargetGpu("NVIDIA H100 80GB HBM3", BUSY, 81559 * MIB),
        TargetGpu("NVIDIA H100 80GB HBM3", IDLE, 81559 * MIB),
        TargetGpu("NVIDIA A100-SXM4-80GB", MIG, None),
    ]


def test_a_gpu_that_pods_share_counts_once() -> None:
    line = 'DCGM_FI_DEV_FB_USED{{gpu="0",UUID="GPU-a",pod="{}"}} 100\n'
    readings, _ = read((line.format("one") + line.format("two")).encode())
    assert [one.value for one in readings] == [100 * MIB]


def test_a_gpu_without_a_uuid_is_known_by_its_place() -> None:
    line = b'DCGM_FI_DEV_GPU_TEMP{gpu="3",Hostname="node-1"} 60\n'
    readings, gpus = read(line)
    assert readings == [Reading(7, "gpu_temperature_c", 60, (("gpu", "node-1:3"),))]
    assert gpus == [TargetGpu("NVIDIA GPU", "node-1:3", None)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"vllm:num_requests_running 1\n",
        b'DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-a"} NaN\n',
        b'DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-a"} -1\n',
        b'DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-a"} 9.223372036854776e+18\n',
        b"DCGM_FI_DEV_GPU_TEMP{gpu= 60\n",
    ],
)
def test_a_page_without_gpus_says_so(text: bytes) -> None:
    with pytest.raises(SamplerError, match="no GPU of dcgm-exporter"):
        read(text)


Serve = Callable[[bytes], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners: list[web.AppRunner] = []

    async def start(body: bytes) -> str:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=body, content_type="text/plain")

        app = web.Application()
        app.router.add_get("/metrics", answer)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}/metrics"

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_scraped_from_an_exporter(serve: Serve) -> None:
    sampler = DcgmSampler(await serve(GOLDEN.read_bytes()), only=frozenset({IDLE, MIG}))
    readings = await sampler.sample()
    await sampler.close()
    assert {dict(one.labels)["gpu"] for one in readings} == {IDLE, MIG}
    assert [gpu.uuid for gpu in sampler.devices()] == [IDLE, MIG]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html><body>404</body></html>", "not a Prometheus page"),
        (GOLDEN.read_bytes()[:-20], "is cut short"),
        (b"# nothing\n", "no GPU of dcgm-exporter"),
        (
            b"".join(b'DCGM_FI_DEV_GPU_TEMP{gpu="%d"} 1\n' % number for number in range(30_000)),
            "more than 20000 series",
        ),
    ],
)
async def test_other_pages_are_refused(serve: Serve, body: bytes, why: str) -> None:
    sampler = DcgmSampler(await serve(body))
    with pytest.raises(SamplerError, match=why):
        await sampler.sample()
    await sampler.close()
