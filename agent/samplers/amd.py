"""AMD GPUs of this machine, through AMD's own library (module amdsmi, extra `servefit[amd]`).

The same readings as NVIDIA's by the same names, as far as the library has them; what a GPU does not
support is left out and not asked for again. Energy comes from the accumulator, where there is one.
The library can hang like any driver, so it has a thread of its own and a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from agent.model import Reading, TargetGpu
from agent.samplers import SamplerError
from agent.samplers.energy import EnergyMeter
from agent.samplers.worker import Worker

REOPEN_NS_MIN = 2_000_000_000  # how soon lost GPUs are looked for; each time twice as late …
REOPEN_NS_MAX = 300_000_000_000  # … up to here

# amdsmi's status codes: not supported, not yet implemented, no permission, not found.
_NEVER = (2, 3, 10, 31)
# Millidegrees: what some releases of amdsmi give as the temperature.
_MILLI_MIN = 1000


class AmdUnavailable(SamplerError):
    """There is no AMD GPU to be read on this machine; the text says why."""


Values = dict[str, float]
_Read = Callable[[Any, Any], Values]


def _number(value: object) -> float | None:
    """A figure of amdsmi's, which writes "N/A" where the GPU has none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _named(pairs: Mapping[str, object], factor: float = 1.0) -> Values:
    found = {name: _number(value) for name, value in pairs.items()}
    return {name: value * factor for name, value in found.items() if value is not None}


# ----------------------------------------------------------------------------------------- fields
# Each takes amdsmi and a handle and returns values by canonical name.


def _memory(smi: Any, handle: Any) -> Values:
    vram = smi.AmdSmiMemoryType.VRAM
    return _named(
        {
            "gpu_memory_used_bytes": smi.amdsmi_get_gpu_memory_usage(handle, vram),
            "gpu_memory_total_bytes": smi.amdsmi_get_gpu_memory_total(handle, vram),
        }
    )


def _activity(smi: Any, handle: Any) -> Values:
    activity = smi.amdsmi_get_gpu_activity(handle)
    pairs = {
        "gpu_utilization_ratio": activity.get("gfx_activity"),
        "gpu_memory_busy_ratio": activity.get("umc_activity"),
    }
    return _named(pairs, 0.01)


def _temperature(smi: Any, handle: Any) -> Values:
    """Of the hottest place: there is no edge sensor on data-centre GPUs."""
    sensor, now = smi.AmdSmiTemperatureType.JUNCTION, smi.AmdSmiTemperatureMetric.CURRENT
    found = _named({"gpu_temperature_c": smi.amdsmi_get_temp_metric(handle, sensor, now)})
    return {k: v / 1000 if v >= _MILLI_MIN else v for k, v in found.items()}


def _clock(smi: Any, handle: Any) -> Values:
    clock = smi.amdsmi_get_clock_info(handle, smi.AmdSmiClkType.GFX)
    return _named({"gpu_sm_clock_hz": clock.get("clk")}, 1e6)


def _memory_clock(smi: Any, handle: Any) -> Values:
    clock = smi.amdsmi_get_clock_info(handle, smi.AmdSmiClkType.MEM)
    return _named({"gpu_memory_clock_hz": clock.get("clk")}, 1e6)


def _throttled(smi: Any, handle: Any) -> Values:
    """Whether power or heat holds the clocks down. Known of MI300 and newer."""
    status = smi.amdsmi_get_violation_status(handle)
    active = [
        status.get(f"active_{cause}")
        for cause in ("ppt_pwr", "prochot_thrm", "socket_thrm", "vr_thrm", "hbm_thrm")
    ]
    known = [one for one in active if isinstance(one, bool | int)]
    return {"gpu_throttled": float(any(known))} if known else {}


def _ecc(smi: Any, handle: Any) -> Values:
    counts = smi.amdsmi_get_gpu_total_ecc_count(handle)
    return _named(
        {
            "gpu_ecc_corrected_total": counts.get("correctable_count"),
            "gpu_ecc_uncorrected_total": counts.get("uncorrectable_count"),
        }
    )


def _pcie(smi: Any, handle: Any) -> Values:
    counts = smi.amdsmi_get_pcie_info(handle).get("pcie_metric", {})
    return _named({"gpu_pcie_replays_total": counts.get("pcie_replay_count")})


def _energy_j(smi: Any, handle: Any) -> Values:
    """The accumulator in steps of `counter_resolution` µJ; older releases call it `power`."""
    count = smi.amdsmi_get_energy_count(handle)
    steps = _number(count.get("energy_accumulator", count.get("power")))
    step_uj = _number(count.get("counter_resolution"))
    return {"gpu_energy_j": steps * step_uj / 1e6} if steps and step_uj else {}


def _polled_power(smi: Any, handle: Any) -> Values:
    info = smi.amdsmi_get_power_info(handle)
    for kind in ("socket_power", "current_socket_power", "average_socket_power"):
        watts = _number(info.get(kind))
        if watts:
            return {"gpu_power_w": watts, "gpu_power_polled": 1}
    return {}


_CORE: tuple[_Read, ...] = (_memory, _activity, _temperature, _clock, _memory_clock, _throttled)
_DETAILS: tuple[_Read, ...] = (_ecc, _pcie)


# ----------------------------------------------------------------------------------------- device


class _Gone(Exception):
    """A GPU that answered answers nothing any more."""


class _Device:
    def __init__(self, smi: Any, handle: Any) -> None:
        self._smi, self._handle = smi, handle
        self._silent: set[_Read] = set()
        self._meter = EnergyMeter()
        self._trouble: str | None = None
        self.processes: dict[int, int | None] = {}
        asic = smi.amdsmi_get_gpu_asic_info(handle)
        uuid = str(smi.amdsmi_get_gpu_device_uuid(handle))
        total = self._ask(_memory).get("gpu_memory_total_bytes")
        name = str(asic.get("market_name") or "AMD GPU")
        self.gpu = TargetGpu(name, uuid, None if total is None else int(total))

    def read(self, details: bool) -> list[Reading]:
        """Raises _Gone where nothing at all is answered."""
        self._trouble = None
        values = self._ask(_energy_j)
        at_ns = time.monotonic_ns()
        values |= self._power(at_ns, values)
        for read in (*_CORE, *(_DETAILS if details else ())):
            values |= self._ask(read)
        if not values and self._trouble:
            raise _Gone(self._trouble)
        if details:
            self.processes = self._processes()
        labels = (("gpu", self.gpu.uuid),)
        return [Reading(at_ns, name, value, labels) for name, value in values.items()]

    def _power(self, at_ns: int, values: Values) -> Values:
        joules = values.get("gpu_energy_j")
        if joules is not None:
            watts = self._meter.power_w(at_ns, joules)
            if not self._meter.still:
                return {} if watts is None else {"gpu_power_w": watts}
            del values["gpu_energy_j"]
        return self._ask(_polled_power)

    def _ask(self, read: _Read) -> Values:
        """What a field says; nothing where it failed. What is not supported is not asked again."""
        if read in self._silent:
            return {}
        try:
            return read(self._smi, self._handle)
        except self._smi.AmdSmiLibraryException as error:
            if error.get_error_code() in _NEVER:
                self._silent.add(read)
            else:
                self._trouble = error.get_error_info(detailed=False)
        except AttributeError:  # a name that this release of amdsmi does not have
            self._silent.add(read)
        return {}

    def _processes(self) -> dict[int, int | None]:
        try:
            listed = self._smi.amdsmi_get_gpu_process_list(self._handle)
        except self._smi.AmdSmiException:
            return {}
        return {int(one["pid"]): one.get("memory_usage", {}).get("vram_mem") for one in listed}


# ------------------------------------------------------------------------------------------ driver


def _module() -> Any:
    try:
        import amdsmi  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise AmdUnavailable(
            "AMD GPUs are read by the module amdsmi: pip install 'servefit[amd]'"
        ) from None
    except Exception:  # it looks for its library while it is imported, and trips over its absence
        raise AmdUnavailable(
            "the module amdsmi finds no libamd_smi.so: install ROCm (package amd-smi-lib)"
        ) from None
    return amdsmi


class _Driver:
    """All use of amdsmi. Runs on the worker thread only."""

    def __init__(self, details_interval_s: float) -> None:
        self._details_ns = int(details_interval_s * 0.95e9)
        self._details_at_ns: int | None = None
        self._smi: Any = None
        self._devices: list[_Device] = []
        self._lost: dict[str, str] = {}
        self._look_again_ns = 0
        self._look_wait_ns = REOPEN_NS_MIN

    def gpus(self) -> list[TargetGpu]:
        return [device.gpu for device in self._devices]

    def processes(self) -> dict[str, dict[int, int | None]]:
        return {device.gpu.uuid: device.processes for device in self._devices}

    def open(self) -> None:
        smi = _module()
        try:
            smi.amdsmi_init()
            self._smi = smi
            devices = list(self._found(smi))
        except smi.AmdSmiException as error:
            self.close()
            raise AmdUnavailable(f"AMD's driver does not answer: {_short(error)}") from error
        if not devices:
            self.close()
            raise AmdUnavailable("AMD's driver on this machine shows no GPU")
        self._devices = devices

    def _found(self, smi: Any) -> Iterator[_Device]:
        for handle in smi.amdsmi_get_processor_handles():
            try:
                yield _Device(smi, handle)
            except smi.AmdSmiException:
                continue  # one that fell off the bus; the others are there

    def read(self) -> list[Reading]:
        now_ns = time.monotonic_ns()
        if (self._lost or self._smi is None) and now_ns >= self._look_again_ns:
            self._reopen(now_ns)
        if self._smi is None:
            raise SamplerError("AMD's driver is gone")
        details = self._details_at_ns is None or now_ns - self._details_at_ns >= self._details_ns
        if details:
            self._details_at_ns = now_ns
        readings: list[Reading] = []
        for device in self._devices:
            try:
                readings += device.read(details)
                self._lost.pop(device.gpu.uuid, None)
            except _Gone as gone:
                self._lose(device.gpu.uuid, str(gone), now_ns)
        if not readings and self._lost:
            uuid, why = next(iter(self._lost.items()))
            raise SamplerError(f"GPU {uuid} is gone: {why}")
        return readings

    def _lose(self, uuid: str, why: str, now_ns: int) -> None:
        if not self._lost:
            self._look_again_ns, self._look_wait_ns = now_ns + REOPEN_NS_MIN, REOPEN_NS_MIN
        self._lost[uuid] = why

    def _reopen(self, now_ns: int) -> None:
        self._look_wait_ns = min(2 * self._look_wait_ns, REOPEN_NS_MAX)
        self._look_again_ns = now_ns + self._look_wait_ns
        self.close()
        self.open()
        self._details_at_ns = None
        found = {device.gpu.uuid for device in self._devices}
        self._lost = {uuid: why for uuid, why in self._lost.items() if uuid not in found}

    def close(self) -> None:
        smi, self._smi = self._smi, None
        if smi is not None:
            try:
                smi.amdsmi_shut_down()
            except smi.AmdSmiException:
                return  # it is down already


def _short(error: Exception) -> str:
    """An error of amdsmi's in one line; its own text has several."""
    info = getattr(error, "get_error_info", None)
    return str(info(detailed=False)) if info else type(error).__name__


# ----------------------------------------------------------------------------------------- sampler


class AmdSampler:
    """The AMD GPUs of this machine.

    Errors of memory and bus, and the process list, are read every `details_interval_s`. The
    constructor waits for the driver and raises AmdUnavailable; with `start_deadline_s` None it does
    not, and the driver is looked for when samples are asked for, again and again.
    """

    name = "amdsmi"

    def __init__(
        self,
        *,
        details_interval_s: float = 10.0,
        deadline_s: float = 2.0,
        start_deadline_s: float | None = 15.0,
    ) -> None:
        self._deadline_s = deadline_s
        self._driver = _Driver(details_interval_s)
        self._worker = Worker("servefit-amdsmi")
        self._closed = False
        if start_deadline_s is not None:
            self._worker.start(self._driver.open, start_deadline_s, "AMD's driver", AmdUnavailable)

    def devices(self) -> list[TargetGpu]:
        """The GPUs found last: name, UUID and memory."""
        return self._driver.gpus()

    def processes(self) -> Mapping[str, Mapping[int, int | None]]:
        """Per UUID: GPU memory in bytes by process; None where the driver does not tell it."""
        return self._driver.processes()

    async def sample(self) -> list[Reading]:
        """The readings of now, each with the label gpu = UUID; a lost GPU has none."""
        return await self._worker.ask(self._driver.read, self._deadline_s, "AMD's driver")

    async def close(self) -> None:
        """Lets the driver go; one that hangs is left to its thread."""
        if not self._closed:
            self._closed = True
            await self._worker.stop(self._driver.close, self._deadline_s)
