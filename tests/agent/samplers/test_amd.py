"""AMD's GPUs, against a module that answers as amdsmi 7.0.2 does.

No AMD GPU is needed: `amdsmi` is replaced by a fake with the names, the return types, the "N/A" and
the exceptions of AMD's own package. Whether a real GPU's figures mean what is made of them here is
not tested.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from agent.metrics import CATALOGUE
from agent.model import Reading, TargetGpu
from agent.samplers import SamplerError, energy
from agent.samplers.amd import AmdSampler, AmdUnavailable

NOT_SUPPORTED, BUSY, DRIVER_NOT_LOADED = 2, 30, 34
UUID = "aaff74a1-0000-1000-80ed-3d9a5a2c1b0e"


class AmdSmiException(Exception):
    pass


class AmdSmiLibraryException(AmdSmiException):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def get_error_code(self) -> int:
        return self.code

    def get_error_info(self, detailed: bool = True) -> str:
        return f"AMDSMI_STATUS_{self.code}" + (" - in many\nwords" if detailed else "")


class Card:
    """The module, and one GPU that it speaks of."""

    def __init__(self) -> None:
        self.steps = 65_359_477_124  # of 15.3 µJ: 1 MJ
        self.fails: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.threads: set[str] = set()
        self.hangs = threading.Event()
        self.hangs.set()
        self.module = types.ModuleType("amdsmi")
        for name, value in {
            "AmdSmiException": AmdSmiException,
            "AmdSmiLibraryException": AmdSmiLibraryException,
            "AmdSmiMemoryType": IntEnum("AmdSmiMemoryType", {"VRAM": 0}),
            "AmdSmiTemperatureType": IntEnum("AmdSmiTemperatureType", {"JUNCTION": 1}),
            "AmdSmiTemperatureMetric": IntEnum("AmdSmiTemperatureMetric", {"CURRENT": 0}),
            "AmdSmiClkType": IntEnum("AmdSmiClkType", {"GFX": 0, "MEM": 4}),
        }.items():
            setattr(self.module, name, value)
        self.answers: dict[str, Any] = {
            "init": lambda: None,
            "shut_down": lambda: None,
            "get_processor_handles": lambda: ["one"],
            "get_gpu_asic_info": lambda handle: {"market_name": "AMD Instinct MI300X"},
            "get_gpu_device_uuid": lambda handle: UUID,
            "get_gpu_memory_usage": lambda handle, kind: 100 << 30,
            "get_gpu_memory_total": lambda handle, kind: 192 << 30,
            "get_gpu_activity": lambda handle: {
                "gfx_activity": 93,
                "umc_activity": 41,
                "mm_activity": "N/A",
            },
            "get_temp_metric": lambda handle, sensor, metric: 67,
            "get_clock_info": lambda handle, kind: {"clk": 2100 if kind == 0 else 1300},
            "get_violation_status": lambda handle: {
                "active_ppt_pwr": True,
                "active_socket_thrm": "N/A",
            },
            "get_gpu_total_ecc_count": lambda handle: {
                "correctable_count": 4,
                "uncorrectable_count": 1,
                "deferred_count": 0,
            },
            "get_pcie_info": lambda handle: {"pcie_metric": {"pcie_replay_count": 9}},
            "get_energy_count": lambda handle: {
                "energy_accumulator": self.steps,
                "counter_resolution": 15.3,
                "timestamp": 1,
            },
            "get_power_info": lambda handle: {
                "socket_power": "N/A",
                "current_socket_power": 512,
                "average_socket_power": "N/A",
            },
            "get_gpu_process_list": lambda handle: [
                {"name": "N/A", "pid": 4711, "mem": 7, "memory_usage": {"vram_mem": 99 << 30}}
            ],
        }
        for name in self.answers:
            setattr(self.module, f"amdsmi_{name}", self._answering(name))

    def _answering(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.threads.add(threading.current_thread().name)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.hangs.wait()
            if name in self.fails:
                raise AmdSmiLibraryException(self.fails[name])
            return self.answers[name](*arguments)

        return call


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setitem(sys.modules, "amdsmi", made.module)
    return made


def values(readings: list[Reading]) -> dict[str, float]:
    assert {one.labels for one in readings} <= {(("gpu", UUID),)}
    assert {one.name for one in readings} <= CATALOGUE.keys()
    return {one.name: one.value for one in readings}


async def test_every_field(card: Card) -> None:
    sampler = AmdSampler()
    assert sampler.devices() == [TargetGpu("AMD Instinct MI300X", UUID, 192 << 30)]
    fields = values(await sampler.sample())
    assert fields == pytest.approx(
        {
            "gpu_energy_j": 1e6,
            "gpu_memory_used_bytes": 100 << 30,
            "gpu_memory_total_bytes": 192 << 30,
            "gpu_utilization_ratio": 0.93,
            "gpu_memory_busy_ratio": 0.41,
            "gpu_temperature_c": 67,
            "gpu_sm_clock_hz": 2.1e9,
            "gpu_memory_clock_hz": 1.3e9,
            "gpu_throttled": 1,
            "gpu_ecc_corrected_total": 4,
            "gpu_ecc_uncorrected_total": 1,
            "gpu_pcie_replays_total": 9,
        }
    )
    assert sampler.processes() == {UUID: {4711: 99 << 30}}
    card.steps += 6_535_948  # 100 J
    await asyncio.sleep(0.2)
    fields = values(await sampler.sample())
    assert 100 < fields["gpu_power_w"] < 510
    assert "gpu_ecc_corrected_total" not in fields  # a detail, not due yet
    assert card.threads == {"servefit-amdsmi"}
    assert "get_power_info" not in card.calls
    await sampler.close()
    assert card.calls["shut_down"] == 1


@pytest.mark.parametrize("how", ["refused", "still", "na"])
async def test_without_an_accumulator_power_is_polled(
    card: Card, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "STILL_NS", 0)
    if how == "refused":
        card.fails["get_energy_count"] = NOT_SUPPORTED
    if how == "na":
        card.answers["get_energy_count"] = lambda handle: {"energy_accumulator": "N/A"}
    sampler = AmdSampler()
    await sampler.sample()
    fields = values(await sampler.sample())
    await sampler.close()
    assert (fields["gpu_power_w"], fields["gpu_power_polled"]) == (512, 1)
    assert "gpu_energy_j" not in fields


async def test_millidegrees_of_older_releases(card: Card) -> None:
    card.answers["get_temp_metric"] = lambda *given: 67_000
    sampler = AmdSampler()
    assert values(await sampler.sample())["gpu_temperature_c"] == 67
    await sampler.close()


async def test_not_supported_silences_that_field_alone(card: Card) -> None:
    card.fails |= {"get_violation_status": NOT_SUPPORTED, "get_clock_info": BUSY}
    sampler = AmdSampler()
    for _ in range(3):
        fields = values(await sampler.sample())
        assert "gpu_throttled" not in fields
        assert fields["gpu_utilization_ratio"] == 0.93
    assert card.calls["get_violation_status"] == 1
    assert card.calls["get_clock_info"] == 6  # being busy passes
    await sampler.close()


async def test_a_release_that_lacks_a_function(card: Card) -> None:
    del card.module.amdsmi_get_violation_status  # type: ignore[attr-defined]
    sampler = AmdSampler()
    assert values(await sampler.sample())["gpu_temperature_c"] == 67
    await sampler.close()


async def test_lost_and_found_again(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = AmdSampler()
    await sampler.sample()
    opened = card.calls["init"]
    card.fails = {name: DRIVER_NOT_LOADED for name in card.answers if name != "shut_down"}
    with pytest.raises(SamplerError, match=f"GPU {UUID} is gone: AMDSMI_STATUS_34$"):
        await sampler.sample()
    with pytest.raises(SamplerError, match="is gone"):
        await sampler.sample()
    assert card.calls["init"] == opened  # not looked for so soon
    monkeypatch.setattr(sampler._driver, "_look_again_ns", 0)
    with pytest.raises(AmdUnavailable, match=r"AMD's driver does not answer: AMDSMI_STATUS_34$"):
        await sampler.sample()
    card.fails = {}
    monkeypatch.setattr(sampler._driver, "_look_again_ns", 0)
    assert values(await sampler.sample())
    await sampler.close()


async def test_a_driver_that_hangs(card: Card) -> None:
    sampler = AmdSampler(deadline_s=0.05)
    card.hangs.clear()
    with pytest.raises(SamplerError, match=r"AMD's driver did not answer within 0\.05 s"):
        await sampler.sample()
    with pytest.raises(SamplerError, match="has not answered for"):
        await sampler.sample()
    card.hangs.set()
    await asyncio.sleep(0.05)
    assert values(await sampler.sample())
    await sampler.close()


def test_a_driver_that_hangs_at_the_start(card: Card) -> None:
    card.hangs.clear()
    with pytest.raises(AmdUnavailable, match=r"did not answer within 0\.05 s"):
        AmdSampler(start_deadline_s=0.05)
    card.hangs.set()


def test_no_gpu(card: Card) -> None:
    card.answers["get_processor_handles"] = list
    with pytest.raises(AmdUnavailable, match="shows no GPU"):
        AmdSampler()


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    with pytest.raises(AmdUnavailable, match=r"pip install 'servefit\[amd\]'"):
        AmdSampler()


def test_the_package_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # amdsmi 7.0.2 ends its import with this where ROCm is not installed.
    (tmp_path / "amdsmi.py").write_text("raise KeyError('libamd_smi.so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    with pytest.raises(AmdUnavailable, match="install ROCm"):
        AmdSampler()
