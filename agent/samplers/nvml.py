"""What the GPUs of this machine do, as NVIDIA's driver tells it (NVML).

The driver can hang, so every call runs on one thread of its own and the caller waits no longer than
a deadline. Each field is asked for once: a device that does not support it is not asked again, and
the other fields go on. A GPU or driver that goes away is looked for again, at growing intervals.

Under MIG each instance has its memory and its processes; energy, power, clocks and temperature
belong to the whole GPU and are told once, of it.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pynvml  # type: ignore[import-untyped]

from agent.model import Reading, TargetGpu
from agent.samplers import SamplerError
from agent.samplers.energy import EnergyMeter
from agent.samplers.worker import Worker

GPM_SPAN_NS_MIN = 100_000_000  # shares of less time say little
REOPEN_NS_MIN = 2_000_000_000  # how soon a lost device is looked for; each time twice as late …
REOPEN_NS_MAX = 300_000_000_000  # … up to here, because looking disturbs the devices that are left
EVENTS_MAX = 64  # Xid errors taken at once: a dying GPU can write thousands

# Clocks held down by power or heat: SwPowerCap, HwSlowdown, SwThermal, HwThermal, HwPowerBrake.
_THROTTLED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80

# GPUs whose memory is the machine's; on these NVML knows no size (`nvidia-smi` says Not Supported).
_UNIFIED = ("GB10", "Orin", "Xavier", "Thor", "Tegra")


class NvmlUnavailable(SamplerError):
    """There is no GPU to be read on this machine; the text says why."""


# ----------------------------------------------------------------------------------------- fields
# Each takes a device's handle and returns values by canonical name. Several alternatives for one
# field stand in order; the first that the driver supports on a device is kept.

Values = dict[str, float]
_Read = Callable[[Any], Values]
Label = tuple[str, str]


def _memory_v2(handle: Any) -> Values:
    """Memory in use without what the driver reserves for itself, as nvidia-smi shows it."""
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return {
        "gpu_memory_used_bytes": memory.used,
        "gpu_memory_total_bytes": memory.total,
        "gpu_memory_reserved_bytes": memory.reserved,
    }


def _memory(handle: Any) -> Values:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {"gpu_memory_used_bytes": memory.used, "gpu_memory_total_bytes": memory.total}


def _memory_unified(handle: Any) -> Values:
    """The host's memory, on a machine where GPU and host share it."""
    from agent.samplers.host import memory  # only such machines need it

    if not any(name in pynvml.nvmlDeviceGetName(handle) for name in _UNIFIED):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    of_host = memory()
    if of_host is None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return {
        "gpu_memory_used_bytes": of_host.used_bytes,
        "gpu_memory_total_bytes": of_host.total_bytes,
        "gpu_memory_unified": 1,
    }


def _utilization(handle: Any) -> Values:
    rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return {"gpu_utilization_ratio": rates.gpu / 100, "gpu_memory_busy_ratio": rates.memory / 100}


def _temperature_v(handle: Any) -> Values:
    celsius = pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU)
    return {"gpu_temperature_c": celsius}


def _temperature(handle: Any) -> Values:
    celsius = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
    return {"gpu_temperature_c": celsius}


def _sm_clock(handle: Any) -> Values:
    return {"gpu_sm_clock_hz": 1e6 * pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)}


def _memory_clock(handle: Any) -> Values:
    megahertz = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
    return {"gpu_memory_clock_hz": 1e6 * megahertz}


def _reasons(handle: Any) -> Values:
    return _from_reasons(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))


def _reasons_old(handle: Any) -> Values:
    """The same by the name it had before driver 535."""
    return _from_reasons(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def _from_reasons(bits: int) -> Values:
    return {"gpu_throttled": float(bool(bits & _THROTTLED)), "gpu_clock_event_reasons": bits}


_CORE: tuple[tuple[str, tuple[_Read, ...]], ...] = (
    ("gpu_memory_used_bytes", (_memory_v2, _memory, _memory_unified)),
    ("gpu_utilization_ratio", (_utilization,)),
    ("gpu_temperature_c", (_temperature_v, _temperature)),
    ("gpu_sm_clock_hz", (_sm_clock,)),
    ("gpu_memory_clock_hz", (_memory_clock,)),
    ("gpu_throttled", (_reasons, _reasons_old)),
)

# What hardly changes: told at the first sample and then only with the details.
_SELDOM = {"gpu_memory_total_bytes", "gpu_memory_reserved_bytes", "gpu_memory_unified"}

# Counters among the details: field → name, a label more, factor. Times are in ns. The three fields
# that tell hardware slowdowns apart are left out: releases of NVML number them differently (251 to
# 253, 269 to 271), and a driver of the other kind answers with something else.
_COUNTERS: dict[int, tuple[str, tuple[Label, ...], float]] = {
    **{
        number: ("gpu_throttled_seconds_total", (("reason", reason),), 1e-9)
        for number, reason in (
            (pynvml.NVML_FI_DEV_PERF_POLICY_POWER, "power"),
            (pynvml.NVML_FI_DEV_PERF_POLICY_THERMAL, "thermal"),
            (pynvml.NVML_FI_DEV_PERF_POLICY_BOARD_LIMIT, "board"),
            (pynvml.NVML_FI_DEV_PERF_POLICY_RELIABILITY, "reliability"),
            (pynvml.NVML_FI_DEV_PERF_POLICY_SYNC_BOOST, "sync_boost"),
        )
    },
    pynvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER: ("gpu_pcie_replays_total", (), 1),
    pynvml.NVML_FI_DEV_ECC_SBE_VOL_TOTAL: ("gpu_ecc_corrected_total", (), 1),
    pynvml.NVML_FI_DEV_ECC_DBE_VOL_TOTAL: ("gpu_ecc_uncorrected_total", (), 1),
}

# PCIe traffic: name → (counter field of newer drivers, which older releases of pynvml do not name;
# argument of the older call, which watches the bus for 20 ms).
_PCIE: dict[str, tuple[int, int]] = {
    "gpu_pcie_sent_bytes_per_s": (197, pynvml.NVML_PCIE_UTIL_TX_BYTES),
    "gpu_pcie_received_bytes_per_s": (198, pynvml.NVML_PCIE_UTIL_RX_BYTES),
}

_GPM: dict[int, str] = {  # metrics of NVML's GPM, in per cent
    3: "gpu_sm_occupancy_ratio",
    5: "gpu_tensor_active_ratio",
    10: "gpu_dram_active_ratio",
}

_VALUE_TYPES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
_WIDE = (2, 3, 4)  # of these, those of 64 bits

_GONE = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
)
_NEVER = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_DEPRECATED,
)
_NEVER_A_FIELD = (*_NEVER, pynvml.NVML_ERROR_INVALID_ARGUMENT)  # a number the driver does not know


class _Gone(Exception):
    """A device does not answer any more."""


_REFUSED = object()


class _Asked:
    """Calls on one handle: what is refused once is not asked again."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.silent: set[object] = set()
        self.trouble: str | None = None  # the newest error that may pass

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The driver's answer; None where it failed this once, _REFUSED where it always will.

        Raises _Gone.
        """
        key = (function, *arguments) if arguments else function
        if key in self.silent:
            return _REFUSED
        try:
            return function(self.handle, *arguments)
        except pynvml.NVMLError as error:
            if error.value in _GONE:
                raise _Gone(str(error)) from error
            if error.value not in _NEVER:
                self.trouble = str(error)
                return None
        except AttributeError:  # a name that this release of pynvml does not have
            pass
        self.silent.add(key)
        return _REFUSED

    def first(self, alternatives: Iterable[_Read]) -> Values:
        """What the first alternative says that the driver supports."""
        for read in alternatives:
            answer = self.call(read)
            if answer is not _REFUSED:
                return answer or {}
        return {}

    def fields(self, numbers: Iterable[int]) -> dict[int, tuple[float, bool]]:
        """Field values by number, in one call: (value, whether it has 64 bits)."""
        wanted = [number for number in numbers if number not in self.silent]
        answer = self.call(_field_values, tuple(wanted)) if wanted else None
        if answer is None or answer is _REFUSED:
            return {}
        found: dict[int, tuple[float, bool]] = {}
        for one in answer:
            if one.nvmlReturn == pynvml.NVML_SUCCESS and one.valueType < len(_VALUE_TYPES):
                value = getattr(one.value, _VALUE_TYPES[one.valueType])
                found[one.fieldId] = value, one.valueType in _WIDE
            elif one.nvmlReturn in _NEVER_A_FIELD:
                self.silent.add(one.fieldId)
        return found


def _field_values(handle: Any, numbers: tuple[int, ...]) -> Any:
    return pynvml.nvmlDeviceGetFieldValues(handle, list(numbers))


# ----------------------------------------------------------------------------------------- device


class _Device:
    """One GPU: its handle, what it supports, and its last counters."""

    def __init__(self, handle: Any, gpm: bool) -> None:
        self.handle = handle
        self.gpu = TargetGpu(
            name=pynvml.nvmlDeviceGetName(handle), uuid=pynvml.nvmlDeviceGetUUID(handle)
        )
        self.processes: dict[int, int | None] = {}
        self._labels: tuple[Label, ...] = (("gpu", self.gpu.uuid),)
        self._asked = _Asked(handle)
        self._meter = EnergyMeter()
        self._told = False  # what hardly changes
        self._pcie: dict[str, tuple[int, float]] = {}  # (at_ns, bytes) of the last details
        self._gpm = _Gpm(handle) if gpm else None
        memory = self._asked.first(_CORE[0][1]).get("gpu_memory_total_bytes")
        if memory:
            self.gpu = TargetGpu(self.gpu.name, self.gpu.uuid, int(memory))

    def read(self, core: bool, details: bool) -> list[Reading]:
        """Energy and power; with `core` what changes every second; with `details` the rest.

        Raises _Gone, also where nothing at all was answered.
        """
        self._asked.trouble = None
        energy_mj = self._asked.call(pynvml.nvmlDeviceGetTotalEnergyConsumption)
        at_ns = time.monotonic_ns()
        values = self._power(at_ns, energy_mj)
        if core:
            for _, alternatives in _CORE:
                values |= self._asked.first(alternatives)
            if not values and self._asked.trouble:
                raise _Gone(self._asked.trouble)
            values |= self._gpm.read(at_ns) if self._gpm else {}
        if self._told and not details:
            values = {name: value for name, value in values.items() if name not in _SELDOM}
        self._told = self._told or core
        readings = [Reading(at_ns, name, value, self._labels) for name, value in values.items()]
        return readings + self._details() if details else readings

    def missing(self) -> list[str]:
        """The fields that the driver refuses on this device, by canonical name."""
        silent = self._asked.silent
        gone = [name for name, reads in _CORE if silent.issuperset(reads)]
        if pynvml.nvmlDeviceGetTotalEnergyConsumption in silent or self._meter.still:
            gone.append("gpu_energy_j")
        for number, (name, labels, _) in _COUNTERS.items():
            if number in silent:
                gone.append(name + "".join(f"{{{value}}}" for _, value in labels))
        return gone

    def close(self) -> None:
        if self._gpm:
            self._gpm.close()

    # ------------------------------------------------------------------------------ energy, power

    def _power(self, at_ns: int, energy_mj: Any) -> Values:
        """Energy and mean power since the last reading; polled power where nothing counts it.

        Polled power is the driver's own average: of a second on Ampere and newer, and on A100 and
        H100 of a quarter of the time only (arXiv 2312.02741).
        """
        if isinstance(energy_mj, int):
            watts = self._meter.power_w(at_ns, energy_mj / 1000)
            if not self._meter.still:
                power = {} if watts is None else {"gpu_power_w": watts}
                return {"gpu_energy_j": energy_mj / 1000, **power}
        if energy_mj is not _REFUSED and not self._meter.still:
            return {}
        milliwatts = self._asked.call(pynvml.nvmlDeviceGetPowerUsage)
        if not isinstance(milliwatts, int):
            return {}
        return {"gpu_power_w": milliwatts / 1000, "gpu_power_polled": 1}

    # ------------------------------------------------------------------------------------ details

    def _details(self) -> list[Reading]:
        pcie_fields = [field for field, _ in _PCIE.values()]
        found = self._asked.fields((*_COUNTERS, *pcie_fields))
        at_ns = time.monotonic_ns()
        readings = [
            Reading(at_ns, name, found[number][0] * factor, self._labels + labels)
            for number, (name, labels, factor) in _COUNTERS.items()
            if number in found
        ]
        for name, (field, argument) in _PCIE.items():
            rate = self._pcie_rate(name, at_ns, found.get(field), argument)
            if rate is not None:
                readings.append(Reading(at_ns, name, rate, self._labels))
        instances = list(self._instances())
        self.processes = self._processes([self._asked, *(asked for asked, _ in instances)])
        for asked, labels in instances:
            readings += _instance_memory(asked, labels)
        return readings

    def _pcie_rate(
        self, name: str, at_ns: int, counted: tuple[float, bool] | None, argument: int
    ) -> float | None:
        """Bytes a second: of the counter since the last details, else of the 20 ms watched now.

        A counter of 32 bits is not taken: a fast bus overruns it ten times a second.
        """
        if counted is None or not counted[1]:
            kilobytes = self._asked.call(pynvml.nvmlDeviceGetPcieThroughput, argument)
            return kilobytes * 1000 if isinstance(kilobytes, int) else None
        before = self._pcie.get(name)
        self._pcie[name] = (at_ns, counted[0])
        if before is None or counted[0] < before[1]:
            return None
        return (counted[0] - before[1]) / ((at_ns - before[0]) / 1e9)

    def _instances(self) -> Iterator[tuple[_Asked, tuple[Label, ...]]]:
        """The MIG instances of now, each with its labels; they come and go while the GPU runs."""
        mode = self._asked.call(pynvml.nvmlDeviceGetMigMode)
        if not isinstance(mode, list) or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return
        count = self._asked.call(pynvml.nvmlDeviceGetMaxMigDeviceCount)
        for index in range(count if isinstance(count, int) else 0):
            try:
                handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(self.handle, index)
                uuid = pynvml.nvmlDeviceGetUUID(handle)
            except pynvml.NVMLError:
                continue  # a place without an instance, or one that was just taken away
            yield _Asked(handle), (*self._labels, ("mig", uuid))

    def _processes(self, handles: Iterable[_Asked]) -> dict[int, int | None]:
        """GPU memory by process: of the GPU and its instances, whichever tells."""
        found: dict[int, int | None] = {}
        for asked in handles:
            for read in (
                pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
                pynvml.nvmlDeviceGetComputeRunningProcesses_v2,
            ):
                answer = asked.call(read)
                if answer is not _REFUSED:
                    found |= {one.pid: one.usedGpuMemory for one in answer or ()}
                    break
        return found


def _instance_memory(asked: _Asked, labels: tuple[Label, ...]) -> list[Reading]:
    values = asked.first((_memory_v2, _memory))
    at_ns = time.monotonic_ns()
    return [
        Reading(at_ns, f"mig_memory_{part}_bytes", values[f"gpu_memory_{part}_bytes"], labels)
        for part in ("used", "total")
        if values
    ]


class _Gpm:
    """GPM of one device: shares of time between two of the driver's samples. Hopper and newer."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._samples: list[Any] = []  # older, newer
        self._at_ns: int | None = None  # of the newer one
        try:
            if pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                self._samples = [pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()]
        except pynvml.NVMLError:
            return  # no GPM: an older device or driver, or one under MIG

    def read(self, at_ns: int) -> Values:
        """Shares since the last call. Nothing where there is no GPM, or the span is too short."""
        if not self._samples or (self._at_ns and at_ns - self._at_ns < GPM_SPAN_NS_MIN):
            return {}
        self._samples.reverse()
        before, self._at_ns = self._at_ns, at_ns
        try:
            pynvml.nvmlGpmSampleGet(self._handle, self._samples[1])
            return self._between() if before else {}
        except pynvml.NVMLError as error:
            self._at_ns = None
            if error.value in _NEVER:
                self.close()
            return {}

    def _between(self) -> Values:
        asked = pynvml.c_nvmlGpmMetricsGet_t()
        asked.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        asked.numMetrics = len(_GPM)
        asked.sample1, asked.sample2 = self._samples
        for place, number in enumerate(_GPM):
            asked.metrics[place].metricId = number
        pynvml.nvmlGpmMetricsGet(asked)
        answers = [asked.metrics[place] for place in range(len(_GPM))]
        return {
            _GPM[one.metricId]: one.value / 100
            for one in answers
            if one.nvmlReturn == pynvml.NVML_SUCCESS and math.isfinite(one.value)
        }

    def close(self) -> None:
        samples, self._samples = self._samples, []
        for sample in samples:
            try:
                pynvml.nvmlGpmSampleFree(sample)
            except pynvml.NVMLError:
                return  # the driver went with it


# --------------------------------------------------------------------------------------------- xid


class _Xids:
    """Xid errors: the driver's own numbers for what went wrong with a GPU.

    Counted from when the agent began to look, over restarts of the driver. The driver tells each
    once, to whoever listens.
    """

    def __init__(self) -> None:
        self._events: Any = None
        self._heard: dict[int | None, str] = {}  # address → UUID of the devices that tell theirs
        self._count: dict[str, int] = {}
        self._last: dict[str, int] = {}

    def listen(self, devices: Iterable[_Device]) -> None:
        self._heard.clear()
        try:
            self._events = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError:
            return
        for device in devices:
            try:
                pynvml.nvmlDeviceRegisterEvents(
                    device.handle, pynvml.nvmlEventTypeXidCriticalError, self._events
                )
            except pynvml.NVMLError:
                continue  # not on this device, or not for this user
            self._heard[_address(device.handle)] = device.gpu.uuid

    def take(self) -> set[str]:
        """Counts what came since the last call; returns the devices that it came from."""
        of: set[str] = set()
        try:
            for _ in range(EVENTS_MAX if self._heard else 0):
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
                uuid = self._heard.get(_address(event.device))
                if uuid is None:
                    continue
                self._count[uuid] = self._count.get(uuid, 0) + 1
                self._last[uuid] = event.eventData
                of.add(uuid)
        except pynvml.NVMLError:
            pass  # TIMEOUT: no more of them; a lost GPU is told by its own calls
        return of

    def readings(self, uuid: str) -> list[Reading]:
        if uuid not in self._heard.values():
            return []
        at_ns, labels = time.monotonic_ns(), (("gpu", uuid),)
        return [
            Reading(at_ns, "gpu_xid_errors_total", self._count.get(uuid, 0), labels),
            Reading(at_ns, "gpu_last_xid", self._last.get(uuid, 0), labels),
        ]

    def close(self) -> None:
        events, self._events = self._events, None
        self._heard.clear()
        if events is not None:
            try:
                pynvml.nvmlEventSetFree(events)
            except pynvml.NVMLError:
                return  # the driver went with it


def _address(handle: Any) -> int | None:
    """What tells handles apart: a GPU that fell off the bus (Xid 79) says its UUID no more."""
    return ctypes.cast(handle, ctypes.c_void_p).value


# ------------------------------------------------------------------------------------------ driver


class _Driver:
    """All use of NVML. Runs on the worker thread only."""

    def __init__(
        self,
        min_interval_s: float,
        details_interval_s: float | None,
        gpm: bool,
        only: frozenset[str] | None,
    ) -> None:
        # A tick that comes a little early is a tick: else every other one would be passed over.
        self._core_ns = int(min_interval_s * 0.9e9)
        self._details_ns = None if details_interval_s is None else int(details_interval_s * 0.95e9)
        self._gpm = gpm
        self._only = only
        self._devices: list[_Device] = []
        self._xids = _Xids()
        self._lost: dict[str, str] = {}  # uuid → what the driver said
        self._core_at_ns: int | None = None
        self._details_due_ns: dict[str, int] = {}  # uuid → when its details are read next
        self._look_again_ns = 0
        self._look_wait_ns = REOPEN_NS_MIN
        self._open = False
        self._away = "the NVIDIA driver was not looked for yet"  # why it is not open

    # Read from other threads: each is one look at a list that is replaced, never changed.

    def gpus(self) -> list[TargetGpu]:
        return [device.gpu for device in self._devices]

    def processes(self) -> dict[str, dict[int, int | None]]:
        return {device.gpu.uuid: device.processes for device in self._devices}

    def missing(self) -> dict[str, list[str]]:
        return {device.gpu.uuid: device.missing() for device in self._devices}

    def open(self) -> None:
        """Finds the devices. Raises NvmlUnavailable, after which it may be tried again."""
        try:
            pynvml.nvmlInit()
            self._open = True
            devices = list(self._found())
            if self._details_ns is not None:
                self._xids.listen(devices)
        except pynvml.NVMLError as error:
            self.close()
            raise NvmlUnavailable(_why(error)) from error
        if not devices:
            self.close()
            raise NvmlUnavailable("the NVIDIA driver on this machine shows no GPU")
        self._devices = devices

    def _found(self) -> Iterator[_Device]:
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                device = _Device(pynvml.nvmlDeviceGetHandleByIndex(index), self._gpm)
            except (pynvml.NVMLError, _Gone):
                continue  # one that fell off the bus; the others are there
            if self._only is None or device.gpu.uuid in self._only:
                yield device

    def read(self) -> list[Reading]:
        if (self._lost or not self._open) and time.monotonic_ns() >= self._look_again_ns:
            self._reopen()
        if not self._open:
            raise SamplerError(self._away)
        now_ns = time.monotonic_ns()
        core = self._core_at_ns is None or now_ns - self._core_at_ns >= self._core_ns
        if core:
            self._core_at_ns = now_ns
        fresh = self._xids.take() if core else set()
        readings: list[Reading] = []
        for device in self._devices:
            uuid = device.gpu.uuid
            details = core and self._details_are_due(uuid, now_ns)
            try:
                readings += device.read(core, details)
                self._lost.pop(uuid, None)
            except _Gone as gone:
                self._lose(uuid, str(gone))
            if details or uuid in fresh:
                readings += self._xids.readings(uuid)
        if not readings and self._lost:
            uuid, why = next(iter(self._lost.items()))
            raise SamplerError(f"GPU {uuid} is gone: {why}")
        return readings

    def _details_are_due(self, uuid: str, now_ns: int) -> bool:
        """Whether a device's details are read now; all at first, then each at a time of its own.

        Where the details mean waiting for the bus, eight GPUs at once would take half a second.
        """
        if self._details_ns is None or now_ns < self._details_due_ns.get(uuid, 0):
            return False
        first = uuid not in self._details_due_ns
        places = [device.gpu.uuid for device in self._devices]
        share = places.index(uuid) / len(places) if first else 0
        self._details_due_ns[uuid] = now_ns + int(self._details_ns * (1 + share))
        return True

    def _lose(self, uuid: str, why: str) -> None:
        if not self._lost:
            self._look_again_ns = time.monotonic_ns() + REOPEN_NS_MIN
            self._look_wait_ns = REOPEN_NS_MIN
        self._lost[uuid] = why

    def _reopen(self) -> None:
        """Starts NVML anew: after a reset or a new driver the old handles stay dead."""
        self._look_wait_ns = min(2 * self._look_wait_ns, REOPEN_NS_MAX)
        self._look_again_ns = time.monotonic_ns() + self._look_wait_ns
        self.close()
        try:
            self.open()
        except NvmlUnavailable as error:
            self._away = str(error)
            self._lost |= dict.fromkeys(self._known(), self._away)
            raise
        found = self._known()
        self._core_at_ns = None
        self._lost = {uuid: why for uuid, why in self._lost.items() if uuid not in found}

    def _known(self) -> set[str]:
        return {device.gpu.uuid for device in self._devices}

    def close(self) -> None:
        self._xids.close()
        for device in self._devices:
            device.close()
        if self._open:
            self._open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError:
                return  # it is down already


def _why(error: Exception) -> str:
    code = getattr(error, "value", None)
    if code == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "no NVIDIA driver on this machine: libnvidia-ml.so.1 not found"
    if code == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "the NVIDIA driver is installed on this machine but not loaded"
    if code == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "the NVIDIA driver was updated and not reloaded: its library and module differ"
    if code == pynvml.NVML_ERROR_NO_PERMISSION:
        return "this user may not ask the NVIDIA driver"
    return f"the NVIDIA driver does not answer: {error}"


# ----------------------------------------------------------------------------------------- sampler


class NvmlSampler:
    """The GPUs of this machine, or those whose UUID is in `only`.

    Energy and power are read at each call, utilization, memory, clocks and temperature at most
    every `min_interval_s`: the last sample of a level always has its energy. With
    `details_interval_s`, counters of throttling, ECC and PCIe, Xid errors, MIG instances and the
    process list come that often. `gpm` asks for the shares of time that tell a GPU bound by memory
    from one bound by arithmetic, where there is GPM.

    `deadline_s` bounds the wait for the driver; a call that hangs is left to its thread, and
    samples fail until it comes back. The constructor waits for the driver to start (seconds, on a
    machine without persistence mode) and raises NvmlUnavailable; with `start_deadline_s` None it
    does not, and the driver is looked for when samples are asked for, again and again.
    """

    name = "nvml"

    def __init__(
        self,
        *,
        min_interval_s: float = 1.0,
        details_interval_s: float | None = None,
        gpm: bool = False,
        deadline_s: float = 2.0,
        start_deadline_s: float | None = 15.0,
        only: frozenset[str] | None = None,
    ) -> None:
        self._deadline_s = deadline_s
        self._driver = _Driver(min_interval_s, details_interval_s, gpm, only)
        self._worker = Worker("servefit-nvml")
        self._closed = False
        if start_deadline_s is not None:
            self._worker.start(
                self._driver.open, start_deadline_s, "the NVIDIA driver", NvmlUnavailable
            )

    def devices(self) -> list[TargetGpu]:
        """The GPUs found last: name, UUID and memory."""
        return self._driver.gpus()

    def processes(self) -> Mapping[str, Mapping[int, int | None]]:
        """Per UUID: GPU memory in bytes by process; None where the driver does not tell it.

        Of the last details. Inside a container these are the host's process numbers, or none.
        """
        return self._driver.processes()

    def missing(self) -> Mapping[str, list[str]]:
        """Per UUID: the readings that the driver refuses on this device."""
        return self._driver.missing()

    async def sample(self) -> list[Reading]:
        """The readings of now, each with the label gpu = UUID; a lost GPU has none."""
        return await self._worker.ask(self._driver.read, self._deadline_s, "the NVIDIA driver")

    async def close(self) -> None:
        """Lets the driver go; a driver that hangs is left to its thread."""
        if not self._closed:
            self._closed = True
            await self._worker.stop(self._driver.close, self._deadline_s)
