"""The real pynvml, driven against a small C library that speaks NVML's ABI."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from agent.model import Reading, TargetGpu
from agent.samplers import SamplerError, nvml
from agent.samplers.nvml import NvmlSampler, NvmlUnavailable
from tests.support import require

SOURCE = Path(__file__).parents[2] / "nvml_standin" / "nvml.c"
UUID = "GPU-00000000-0000-0000-0000-000000000000"
NOT_SUPPORTED, GPU_IS_LOST, UNKNOWN, DRIVER_NOT_LOADED = 3, 15, 999, 9


def compiled(folder: Path, *flags: str) -> Path:
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    require(cc, "a C compiler")
    assert cc is not None
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(
        [cc, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags, "-o", library, SOURCE],
        check=True,
    )
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("nvml_old"), "-DOLD_DRIVER")


class Driver:
    """The stand-in, loaded where pynvml looks for the driver, and its control file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, control: Path) -> None:
        self._monkeypatch = monkeypatch
        self._control = control
        self.library: ctypes.CDLL | None = None
        self.set()
        monkeypatch.setenv("NVML_STANDIN", str(control))

    def load(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self._monkeypatch.setattr(pynvml, "nvmlLib", self.library)
        self._monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def set(self, *lines: str) -> None:
        fresh = self._control.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in lines))
        fresh.replace(self._control)

    def calls(self, function: str) -> int:
        assert self.library is not None
        return int(self.library.standin_calls(function.encode()))


@pytest.fixture
def driver(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    loaded = Driver(monkeypatch, tmp_path / "control")
    loaded.load(library)
    yield loaded
    loaded.set()  # lets a hanging call go


def values(readings: list[Reading], uuid: str = UUID) -> dict[str, float]:
    return {one.name: one.value for one in readings if one.labels == (("gpu", uuid),)}


async def test_every_field_of_a_modern_gpu(driver: Driver) -> None:
    driver.set("reasons 4")  # SwPowerCap
    sampler = NvmlSampler()
    assert sampler.devices() == [TargetGpu("Stand-in GPU 0", UUID, 80 << 30)]
    first = await sampler.sample()
    await asyncio.sleep(0.12)
    second = await sampler.sample()
    await sampler.close()
    fields = values(first)
    assert fields.pop("gpu_energy_j") == pytest.approx(time.monotonic() * 300, rel=0.01)
    assert fields == {
        "gpu_memory_used_bytes": 60 << 30,  # v2: without what the driver reserves
        "gpu_memory_total_bytes": 80 << 30,
        "gpu_utilization_ratio": 0.87,
        "gpu_temperature_c": 65,
        "gpu_throttled": 1,
    }
    # Inside min_interval_s only energy and the power that follows from it are read.
    assert values(second).keys() == {"gpu_energy_j", "gpu_power_w"}
    assert values(second)["gpu_power_w"] == pytest.approx(300, rel=0.05)
    assert driver.calls("nvmlDeviceGetPowerUsage") == 0  # the counter is there: never polled


@pytest.mark.parametrize(("bits", "throttled"), [(0x1, 0), (0x4, 1), (0x20, 1), (0x100, 0)])
async def test_idle_is_not_throttled(driver: Driver, bits: int, throttled: float) -> None:
    driver.set(f"reasons {bits}")
    sampler = NvmlSampler()
    assert values(await sampler.sample())["gpu_throttled"] == throttled
    await sampler.close()


async def test_without_a_counter_power_is_polled(driver: Driver) -> None:
    driver.set(f"error.nvmlDeviceGetTotalEnergyConsumption {NOT_SUPPORTED}", "power 123000")
    before = driver.calls("nvmlDeviceGetTotalEnergyConsumption")
    sampler = NvmlSampler()
    for _ in range(3):
        fields = values(await sampler.sample())
        assert fields["gpu_power_w"] == 123
        assert "gpu_energy_j" not in fields
    await sampler.close()
    assert driver.calls("nvmlDeviceGetTotalEnergyConsumption") - before == 1


async def test_a_counter_that_stands_still_is_none(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "STILL_NS", 10_000_000)
    driver.set("energy.0 0")
    sampler = NvmlSampler()
    assert values(await sampler.sample())["gpu_energy_j"] == 0
    await asyncio.sleep(0.02)
    await sampler.sample()
    fields = values(await sampler.sample())
    assert fields == {"gpu_power_w": 250}
    await sampler.close()


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetUtilizationRates", "gpu_utilization_ratio"),
        ("nvmlDeviceGetTemperatureV", None),  # the older call answers instead
        ("nvmlDeviceGetMemoryInfo_v2", None),
        ("nvmlDeviceGetCurrentClocksEventReasons", None),
    ],
)
async def test_not_supported_silences_that_field_alone(
    driver: Driver, function: str, field: str | None
) -> None:
    driver.set(f"error.{function} {NOT_SUPPORTED}")
    before = driver.calls(function)
    sampler = NvmlSampler(min_interval_s=0)
    everything = {
        *("gpu_energy_j", "gpu_memory_used_bytes", "gpu_memory_total_bytes"),
        *("gpu_utilization_ratio", "gpu_temperature_c", "gpu_throttled"),
    }
    for _ in range(3):
        assert values(await sampler.sample()).keys() - {"gpu_power_w"} == everything - {field}
    await sampler.close()
    assert driver.calls(function) - before == 1


async def test_an_error_that_passes_is_asked_again(driver: Driver) -> None:
    driver.set(f"error.nvmlDeviceGetUtilizationRates {UNKNOWN}")
    sampler = NvmlSampler(min_interval_s=0)
    assert "gpu_utilization_ratio" not in values(await sampler.sample())
    driver.set()
    assert values(await sampler.sample())["gpu_utilization_ratio"] == 0.87
    await sampler.close()


async def test_an_old_driver_lacks_functions(driver: Driver, old_library: Path) -> None:
    driver.load(old_library)
    sampler = NvmlSampler()
    fields = values(await sampler.sample())
    await sampler.close()
    assert fields["gpu_memory_used_bytes"] == 61 << 30
    assert fields["gpu_temperature_c"] == 64
    assert fields["gpu_throttled"] == 0


async def test_energy_that_falls_gives_no_power(driver: Driver) -> None:
    sampler = NvmlSampler()
    seen = []
    for millijoules in (5_000_000, 6_000_000, 1_000, 61_000):
        driver.set(f"energy.0 {millijoules}")
        seen.append(values(await sampler.sample()))
        await asyncio.sleep(0.11)
    await sampler.close()
    assert [one["gpu_energy_j"] for one in seen] == [5000, 6000, 1, 61]
    assert "gpu_power_w" not in seen[0]
    assert seen[1]["gpu_power_w"] > 0
    assert "gpu_power_w" not in seen[2]  # the driver was reloaded
    assert 0 < seen[3]["gpu_power_w"] < 600


async def test_a_lost_gpu_leaves_the_others(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.set("devices 2")
    sampler = NvmlSampler(min_interval_s=0)
    other = UUID[:-1] + "1"
    lost = f"error.1.nvmlDeviceGetTotalEnergyConsumption {GPU_IS_LOST}"
    driver.set("devices 2", lost)
    readings = await sampler.sample()
    assert values(readings)
    assert not values(readings, other)
    driver.set("devices 2", lost, f"error.0.nvmlDeviceGetTotalEnergyConsumption {GPU_IS_LOST}")
    with pytest.raises(SamplerError, match="is gone"):
        await sampler.sample()
    driver.set("devices 2")
    monkeypatch.setattr(nvml, "REOPEN_NS", 0)  # as if half a minute had gone
    readings = await sampler.sample()
    await sampler.close()
    assert values(readings)
    assert values(readings, other)


async def test_a_gpu_lost_before_the_start_is_left_out(driver: Driver) -> None:
    driver.set("devices 2", f"error.0.nvmlDeviceGetHandleByIndex_v2 {GPU_IS_LOST}")
    sampler = NvmlSampler()
    assert [gpu.name for gpu in sampler.devices()] == ["Stand-in GPU 1"]
    await sampler.close()


async def test_only_the_named_gpus(driver: Driver) -> None:
    driver.set("devices 3")
    sampler = NvmlSampler(only=frozenset({UUID[:-1] + "2"}))
    readings = await sampler.sample()
    await sampler.close()
    assert {dict(one.labels)["gpu"] for one in readings} == {UUID[:-1] + "2"}


async def test_a_hung_driver_stops_nobody(driver: Driver) -> None:
    sampler = NvmlSampler(min_interval_s=0, deadline_s=0.2)
    driver.set("hang.nvmlDeviceGetUtilizationRates 1")
    ticks = 0

    async def ticking() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(ticking())
    with pytest.raises(SamplerError, match=r"did not answer within 0\.2 s"):
        await sampler.sample()
    ticker.cancel()
    assert ticks >= 10  # the event loop ran on
    began = time.monotonic()
    with pytest.raises(SamplerError, match="has not answered for"):
        await sampler.sample()
    assert time.monotonic() - began < 0.1  # and nobody waits a second time
    driver.set()
    await asyncio.sleep(0.1)
    assert values(await sampler.sample())
    await sampler.close()
    await sampler.close()


def test_a_driver_that_hangs_at_the_start(driver: Driver) -> None:
    driver.set("hang.nvmlInitWithFlags 1")
    with pytest.raises(NvmlUnavailable, match=r"did not answer within 0\.1 s"):
        NvmlSampler(start_deadline_s=0.1)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f"error.nvmlInitWithFlags {DRIVER_NOT_LOADED}", "installed on this machine but not load"),
        ("error.nvmlInitWithFlags 18", "updated and not reloaded"),
        ("error.nvmlInitWithFlags 4", "this user may not"),
        ("error.nvmlInitWithFlags 999", "does not answer"),
        ("devices 0", "shows no GPU"),
    ],
)
def test_unavailable_says_why(driver: Driver, line: str, why: str) -> None:
    driver.set(line)
    with pytest.raises(NvmlUnavailable, match=why):
        NvmlSampler()


_CHILD = """
import asyncio, json
from agent.samplers.nvml import NvmlSampler, NvmlUnavailable
async def main():
    try:
        sampler = NvmlSampler(start_deadline_s=1)
    except NvmlUnavailable as error:
        return str(error)
    readings = await sampler.sample()
    await sampler.close()
    return {one.name: one.value for one in readings}
print(json.dumps(asyncio.run(main())))
"""


def child(**environment: str) -> object:
    """What a fresh process, which loads the driver the real way, says."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        timeout=30,
        check=True,
    )
    return json.loads(done.stdout)


def test_loaded_the_way_a_driver_is(library: Path) -> None:
    answer = child(LD_LIBRARY_PATH=str(library.parent), NVML_STANDIN="")
    assert isinstance(answer, dict)
    assert answer["gpu_temperature_c"] == 65


def test_a_process_ends_although_the_driver_hangs(library: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    control.write_text("hang.nvmlInitWithFlags 1\n")
    answer = child(LD_LIBRARY_PATH=str(library.parent), NVML_STANDIN=str(control))
    assert answer == "the NVIDIA driver did not answer within 1 s"


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(pynvml, "CDLL", missing)
    with pytest.raises(NvmlUnavailable) as caught:
        NvmlSampler()
    assert str(caught.value) == ("no NVIDIA driver on this machine: libnvidia-ml.so.1 not found")
