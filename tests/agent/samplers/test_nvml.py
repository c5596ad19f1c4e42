"""The real pynvml, driven against a small C library that speaks NVML's ABI."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pynvml
import pytest

from agent.model import Reading, TargetGpu
from agent.samplers import SamplerError, energy, nvml
from agent.samplers.host import memory
from agent.samplers.nvml import NvmlSampler, NvmlUnavailable
from tests.nvml_standin import compiled

UUID = "GPU-00000000-0000-0000-0000-000000000000"
NOT_SUPPORTED, GPU_IS_LOST, UNKNOWN, DRIVER_NOT_LOADED = 3, 15, 999, 9
ENERGY = "nvmlDeviceGetTotalEnergyConsumption"
MEMORY_CALLS = ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2")


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


def at_once(sampler: NvmlSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is looked for at the next sample, as if the wait for it were over."""
    monkeypatch.setattr(nvml, "REOPEN_NS_MIN", 0)
    monkeypatch.setattr(sampler._driver, "_look_again_ns", 0)
    monkeypatch.setattr(sampler._driver, "_look_wait_ns", 0)


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
        "gpu_memory_reserved_bytes": 1 << 30,
        "gpu_utilization_ratio": 0.87,
        "gpu_memory_busy_ratio": 0.4,
        "gpu_temperature_c": 65,
        "gpu_sm_clock_hz": 1.98e9,
        "gpu_memory_clock_hz": 2.619e9,
        "gpu_throttled": 1,
        "gpu_clock_event_reasons": 4,
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
        assert (fields["gpu_power_w"], fields["gpu_power_polled"]) == (123, 1)
        assert "gpu_energy_j" not in fields
    assert sampler.missing() == {UUID: ["gpu_energy_j"]}
    await sampler.close()
    assert driver.calls("nvmlDeviceGetTotalEnergyConsumption") - before == 1


async def test_a_counter_that_stands_still_is_none(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "STILL_NS", 10_000_000)
    driver.set("energy.0 0")
    sampler = NvmlSampler()
    assert values(await sampler.sample())["gpu_energy_j"] == 0
    await asyncio.sleep(0.02)
    await sampler.sample()
    assert values(await sampler.sample()) == {"gpu_power_w": 250, "gpu_power_polled": 1}
    driver.set("energy.0 900")  # it counts after all
    await asyncio.sleep(0.11)
    assert values(await sampler.sample()) == {"gpu_energy_j": 0.9}
    driver.set("energy.0 1900")
    await asyncio.sleep(0.11)
    assert values(await sampler.sample()).keys() == {"gpu_energy_j", "gpu_power_w"}
    await sampler.close()


@pytest.mark.parametrize(
    ("function", "fields"),
    [
        ("nvmlDeviceGetUtilizationRates", {"gpu_utilization_ratio", "gpu_memory_busy_ratio"}),
        ("nvmlDeviceGetClockInfo", {"gpu_sm_clock_hz", "gpu_memory_clock_hz"}),
        ("nvmlDeviceGetTemperatureV", set()),  # the older call answers instead
        ("nvmlDeviceGetCurrentClocksEventReasons", set()),
    ],
)
async def test_not_supported_silences_that_field_alone(
    driver: Driver, function: str, fields: set[str]
) -> None:
    driver.set(f"error.{function} {NOT_SUPPORTED}")
    before = driver.calls(function)
    sampler = NvmlSampler(min_interval_s=0)
    everything = {
        *("gpu_energy_j", "gpu_memory_used_bytes", "gpu_utilization_ratio"),
        *("gpu_memory_busy_ratio", "gpu_temperature_c", "gpu_sm_clock_hz", "gpu_memory_clock_hz"),
        *("gpu_throttled", "gpu_clock_event_reasons"),
    }
    once = {"gpu_memory_total_bytes", "gpu_memory_reserved_bytes"}  # told at the first sample
    assert values(await sampler.sample()).keys() == (everything | once) - fields
    for _ in range(2):
        assert values(await sampler.sample()).keys() - {"gpu_power_w"} == everything - fields
    assert driver.calls(function) - before <= 2  # once for each kind of clock
    assert set(sampler.missing()[UUID]) <= fields
    await sampler.close()


async def test_memory_without_what_is_reserved_is_not_known_to_every_driver(
    driver: Driver,
) -> None:
    driver.set(f"error.nvmlDeviceGetMemoryInfo_v2 {NOT_SUPPORTED}")
    sampler = NvmlSampler()
    fields = values(await sampler.sample())
    await sampler.close()
    assert fields["gpu_memory_used_bytes"] == 61 << 30
    assert "gpu_memory_reserved_bytes" not in fields


@pytest.mark.parametrize("unified", [0, 1])
async def test_memory_that_gpu_and_host_share(driver: Driver, unified: int) -> None:
    neither = (f"error.{name} {NOT_SUPPORTED}" for name in MEMORY_CALLS)
    driver.set(f"unified {unified}", *neither)
    sampler = NvmlSampler()
    fields = values(await sampler.sample())
    await sampler.close()
    host = memory()
    assert host is not None
    if unified:
        assert fields["gpu_memory_unified"] == 1
        assert fields["gpu_memory_total_bytes"] == host.total_bytes
        assert sampler.devices()[0].memory_total_bytes == host.total_bytes
    else:  # a virtual GPU, say: the host's memory would be a lie
        assert "gpu_memory_used_bytes" not in fields
        assert "gpu_memory_used_bytes" in sampler.missing()[UUID]


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
    at_once(sampler, monkeypatch)
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


# ----------------------------------------------------------------------------------------- details


def labelled(readings: list[Reading], name: str) -> dict[str, float]:
    """A series by its label besides gpu."""
    return {
        ",".join(value for key, value in one.labels if key != "gpu"): one.value
        for one in readings
        if one.name == name
    }


def by_gpu(readings: list[Reading], name: str) -> dict[int, float]:
    return {int(dict(one.labels)["gpu"][-1], 16): one.value for one in readings if one.name == name}


async def test_the_details_come_when_they_are_due(driver: Driver) -> None:
    polled = driver.calls("nvmlDeviceGetPcieThroughput")
    sampler = NvmlSampler(min_interval_s=0, details_interval_s=0.2)
    first = await sampler.sample()
    assert labelled(first, "gpu_throttled_seconds_total") == {"power": 1.5, "thermal": 0.25}
    fields = values(first)
    assert fields["gpu_pcie_replays_total"] == 7
    assert fields["gpu_ecc_corrected_total"] == 2
    assert fields["gpu_ecc_uncorrected_total"] == 0
    assert fields["gpu_xid_errors_total"] == 0
    assert "gpu_pcie_sent_bytes_per_s" not in fields  # a counter needs two looks
    between = values(await sampler.sample())
    assert not between.keys() & {"gpu_ecc_corrected_total", "gpu_memory_total_bytes"}
    await asyncio.sleep(0.2)
    fields = values(await sampler.sample())
    assert fields["gpu_pcie_sent_bytes_per_s"] == pytest.approx(3e9, rel=0.05)
    assert fields["gpu_pcie_received_bytes_per_s"] == pytest.approx(5e9, rel=0.05)
    assert fields["gpu_memory_total_bytes"] == 80 << 30
    assert driver.calls("nvmlDeviceGetPcieThroughput") == polled  # it would wait for 20 ms
    refused = {"board", "reliability", "sync_boost"}
    assert set(sampler.missing()[UUID]) == {f"gpu_throttled_seconds_total{{{x}}}" for x in refused}
    await sampler.close()


@pytest.mark.parametrize(
    "line", ["pcie_bits 32", f"error.field.197 {NOT_SUPPORTED}", "error.field.197 2"]
)
async def test_pcie_traffic_is_polled_where_no_wide_counter_is(driver: Driver, line: str) -> None:
    driver.set(line)
    sampler = NvmlSampler(details_interval_s=10)
    fields = values(await sampler.sample())
    await sampler.close()
    assert fields["gpu_pcie_sent_bytes_per_s"] == 1.5e6


async def test_without_details_nothing_of_them_is_asked(driver: Driver) -> None:
    asked = ("nvmlDeviceGetFieldValues", "nvmlEventSetCreate", "nvmlDeviceGetMigMode")
    before = [driver.calls(one) for one in asked]
    sampler = NvmlSampler(min_interval_s=0)
    await sampler.sample()
    await sampler.close()
    assert [driver.calls(one) for one in asked] == before


async def test_details_of_many_gpus_are_spread_over_the_interval(driver: Driver) -> None:
    driver.set("devices 8")
    sampler = NvmlSampler(min_interval_s=0, details_interval_s=0.4)
    everyone = by_gpu(await sampler.sample(), "gpu_ecc_corrected_total")
    assert len(everyone) == 8
    seen = []
    for _ in range(40):
        await asyncio.sleep(0.02)
        seen.append(by_gpu(await sampler.sample(), "gpu_ecc_corrected_total"))
    await sampler.close()
    assert set().union(*seen) == everyone.keys()
    assert max(len(one) for one in seen) < 8


async def test_processes_and_their_memory(driver: Driver, old_library: Path) -> None:
    other = UUID[:-1] + "1"
    for _ in range(2):
        driver.set("devices 2", "process.0.71 1000", "process.0.72 2000", "process.1.73 3000")
        sampler = NvmlSampler(details_interval_s=10)
        assert sampler.processes() == {UUID: {}, other: {}}
        await sampler.sample()
        assert sampler.processes() == {UUID: {71: 1000, 72: 2000}, other: {73: 3000}}
        await sampler.close()
        driver.load(old_library)


async def test_a_process_whose_memory_is_not_told(driver: Driver) -> None:
    driver.set(f"process.0.4711 {2**64 - 1}")
    sampler = NvmlSampler(details_interval_s=10)
    await sampler.sample()
    await sampler.close()
    assert sampler.processes() == {UUID: {4711: None}}


async def test_xid_errors_are_counted_and_told_at_once(driver: Driver) -> None:
    driver.set("devices 2")
    sampler = NvmlSampler(min_interval_s=0, details_interval_s=3600)
    assert by_gpu(await sampler.sample(), "gpu_xid_errors_total") == {0: 0, 1: 0}
    assert by_gpu(await sampler.sample(), "gpu_xid_errors_total") == {}
    driver.set("devices 2", "xid.1 79", "xids 2")
    readings = await sampler.sample()
    assert by_gpu(readings, "gpu_xid_errors_total") == {1: 2}
    assert by_gpu(readings, "gpu_last_xid") == {1: 79}
    await sampler.close()


async def test_the_xid_of_a_gpu_that_fell_off_the_bus_is_told(driver: Driver) -> None:
    driver.set("devices 2")
    sampler = NvmlSampler(min_interval_s=0, details_interval_s=3600)
    await sampler.sample()
    lost = (f"error.1.{call} {GPU_IS_LOST}" for call in ("nvmlDeviceGetUUID", ENERGY))
    driver.set("devices 2", "xid.1 79", "xids 1", *lost)
    readings = await sampler.sample()
    assert by_gpu(readings, "gpu_last_xid") == {1: 79}
    assert by_gpu(readings, "gpu_energy_j").keys() == {0}
    await sampler.close()


async def test_a_flood_of_xid_errors_does_not_hold_the_sampler_up(driver: Driver) -> None:
    sampler = NvmlSampler(min_interval_s=0, details_interval_s=3600)
    await sampler.sample()
    driver.set("xid.0 31", "xids 1000000")
    readings = await sampler.sample()
    assert by_gpu(readings, "gpu_xid_errors_total") == {0: nvml.EVENTS_MAX}
    await sampler.close()


async def test_where_no_xid_is_told_none_is_claimed(driver: Driver) -> None:
    driver.set(f"error.nvmlDeviceRegisterEvents {NOT_SUPPORTED}")
    sampler = NvmlSampler(details_interval_s=10)
    assert "gpu_xid_errors_total" not in values(await sampler.sample())
    await sampler.close()


async def test_mig_instances_have_memory_and_processes_but_no_energy(driver: Driver) -> None:
    driver.set("devices 2", "mig.0 2", "process.0.mig.99 500", "process.1.98 700")
    sampler = NvmlSampler(details_interval_s=10)
    readings = await sampler.sample()
    await sampler.close()
    one, other = ("MIG" + UUID[3:], "MIG" + UUID[3:-3] + "200")
    assert labelled(readings, "mig_memory_used_bytes") == {one: 3 << 30, other: 5 << 30}
    assert labelled(readings, "mig_memory_total_bytes") == {one: 20 << 30, other: 20 << 30}
    energy = [reading.labels for reading in readings if reading.name == "gpu_energy_j"]
    assert energy == [(("gpu", UUID),), (("gpu", UUID[:-1] + "1"),)]
    assert "gpu_utilization_ratio" not in values(readings)  # not of a GPU in parts
    assert values(readings, UUID[:-1] + "1")["gpu_utilization_ratio"] == 0.87
    assert sampler.processes() == {UUID: {99: 500}, UUID[:-1] + "1": {98: 700}}


async def test_mig_instances_come_and_go(driver: Driver) -> None:
    sampler = NvmlSampler(min_interval_s=0, details_interval_s=0.01)
    for many in (1, 3, 0):
        driver.set(f"mig.0 {many}")
        await asyncio.sleep(0.02)
        assert len(labelled(await sampler.sample(), "mig_memory_used_bytes")) == many
    await sampler.close()


async def test_gpm_tells_memory_from_arithmetic(driver: Driver) -> None:
    sampler = NvmlSampler(min_interval_s=0, gpm=True)
    shares = {"gpu_sm_occupancy_ratio", "gpu_tensor_active_ratio", "gpu_dram_active_ratio"}
    assert not shares & values(await sampler.sample()).keys()  # one look is none
    await asyncio.sleep(0.12)
    fields = values(await sampler.sample())
    assert {name: fields[name] for name in shares} == {
        "gpu_sm_occupancy_ratio": 0.45,
        "gpu_tensor_active_ratio": 0.125,
        "gpu_dram_active_ratio": 0.81,
    }
    await sampler.close()
    assert driver.calls("nvmlGpmSampleFree") == driver.calls("nvmlGpmSampleAlloc")


@pytest.mark.parametrize(
    "line",
    [
        "gpm 0",
        f"error.nvmlGpmQueryDeviceSupport {NOT_SUPPORTED}",
        f"error.nvmlGpmSampleGet {NOT_SUPPORTED}",
        f"error.nvmlGpmMetricsGet {NOT_SUPPORTED}",
    ],
)
async def test_without_gpm_the_rest_goes_on(driver: Driver, line: str) -> None:
    driver.set(line)
    asked = driver.calls("nvmlGpmSampleGet")
    sampler = NvmlSampler(min_interval_s=0, gpm=True)
    for _ in range(4):
        fields = values(await sampler.sample())
        assert fields["gpu_utilization_ratio"] == 0.87
        assert "gpu_dram_active_ratio" not in fields
        await asyncio.sleep(0.11)
    await sampler.close()
    assert driver.calls("nvmlGpmSampleGet") - asked <= 2
    assert driver.calls("nvmlGpmSampleFree") == driver.calls("nvmlGpmSampleAlloc")


async def test_gpm_is_not_asked_for_unless_wanted(driver: Driver) -> None:
    before = driver.calls("nvmlGpmQueryDeviceSupport")
    sampler = NvmlSampler()
    await sampler.close()
    assert driver.calls("nvmlGpmQueryDeviceSupport") == before


# ---------------------------------------------------------------------------- drivers that go away


async def test_a_restarted_driver_is_found_again(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.set("devices 2")
    sampler = NvmlSampler(min_interval_s=0, details_interval_s=3600, gpm=True)
    await sampler.sample()
    driver.set("devices 2", "xid.0 13", "xids 1")
    await sampler.sample()
    driver.set("devices 2", "epoch 1", f"error.nvmlInitWithFlags {DRIVER_NOT_LOADED}")
    with pytest.raises(SamplerError, match="is gone"):
        await sampler.sample()
    at_once(sampler, monkeypatch)
    with pytest.raises(SamplerError, match="not loaded"):
        await sampler.sample()
    driver.set("devices 2", "epoch 1", "energy.0 1000")
    readings = await sampler.sample()
    assert values(readings)["gpu_energy_j"] == 1
    assert values(readings, UUID[:-1] + "1")
    driver.set("devices 2", "epoch 1", "xid.0 13", "xids 1")
    readings = await sampler.sample()
    assert by_gpu(readings, "gpu_xid_errors_total") == {0: 2}  # counted over the restart
    await sampler.close()


async def test_an_unplugged_gpu_comes_back(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.set("devices 3")
    sampler = NvmlSampler(min_interval_s=0)
    gone = UUID[:-1] + "2"
    driver.set("devices 2")
    assert not values(await sampler.sample(), gone)
    at_once(sampler, monkeypatch)
    assert not values(await sampler.sample(), gone)
    assert len(sampler.devices()) == 2
    driver.set("devices 3")
    assert values(await sampler.sample(), gone)
    assert len(sampler.devices()) == 3
    await sampler.close()


async def test_what_is_lost_is_looked_for_ever_more_seldom(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = time.monotonic_ns()
    driver.set("devices 2")
    sampler = NvmlSampler(min_interval_s=0)
    monkeypatch.setattr("time.monotonic_ns", lambda: now_ns)
    driver.set("devices 1")
    looks = []
    for second in range(1200):
        before = driver.calls("nvmlInitWithFlags")
        sampler._driver.read()
        now_ns += 1_000_000_000
        if driver.calls("nvmlInitWithFlags") > before:
            looks.append(second)
    await sampler.close()
    assert looks[0] == 2
    assert [b - a for a, b in pairwise(looks)] == [4, 8, 16, 32, 64, 128, 256, 300, 300]


async def test_errors_of_every_call_are_a_loss_too(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = (
        *("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetUtilizationRates", *MEMORY_CALLS),
        *("nvmlDeviceGetTemperatureV", "nvmlDeviceGetClockInfo"),
        "nvmlDeviceGetCurrentClocksEventReasons",
    )
    sampler = NvmlSampler(min_interval_s=0)
    driver.set(*(f"error.{one} {UNKNOWN}" for one in calls))
    with pytest.raises(SamplerError, match="is gone: Unknown Error"):
        await sampler.sample()
    driver.set()
    at_once(sampler, monkeypatch)
    assert values(await sampler.sample())
    await sampler.close()


async def test_a_driver_that_comes_later(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.set(f"error.nvmlInitWithFlags {DRIVER_NOT_LOADED}")
    sampler = NvmlSampler(start_deadline_s=None)
    with pytest.raises(NvmlUnavailable, match="not loaded"):
        await sampler.sample()
    driver.set()
    with pytest.raises(SamplerError, match="not loaded"):
        await sampler.sample()  # not looked for again so soon
    at_once(sampler, monkeypatch)
    assert values(await sampler.sample())
    await sampler.close()


# ------------------------------------------------------------------------------- in other processes


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
