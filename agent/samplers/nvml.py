"""What the GPUs of this machine do, as NVIDIA's driver tells it (NVML).

The driver can hang, so every call runs on one thread of its own and the caller waits no longer than
a deadline. Each field is asked for once: a device that does not support it is not asked again, and
the other fields go on. MIG: only whole devices are listed, because energy belongs to them.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import pynvml  # type: ignore[import-untyped]

from agent.model import Reading, TargetGpu
from agent.samplers import SamplerError

T = TypeVar("T")

POWER_SPAN_NS_MIN = 100_000_000  # the energy counter moves every 20 to 100 ms
STILL_NS = 1_000_000_000  # a counter that stands still for this long counts nothing
REOPEN_NS = 30_000_000_000  # how often a lost device is looked for

# Clocks held down by power or heat: SwPowerCap, HwSlowdown, SwThermal, HwThermal, HwPowerBrake.
_THROTTLED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


class NvmlUnavailable(SamplerError):
    """There is no GPU to be read on this machine; the text says why."""


# ----------------------------------------------------------------------------------------- fields
# Each takes a device's handle and returns values by canonical name. Several alternatives for one
# field stand in order; the first that the driver supports on a device is kept.

Values = dict[str, float]
_Read = Callable[[Any], Values]


def _memory_v2(handle: Any) -> Values:
    """Memory in use without what the driver reserves for itself, as nvidia-smi shows it."""
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return {"gpu_memory_used_bytes": memory.used, "gpu_memory_total_bytes": memory.total}


def _memory(handle: Any) -> Values:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {"gpu_memory_used_bytes": memory.used, "gpu_memory_total_bytes": memory.total}


def _utilization(handle: Any) -> Values:
    return {"gpu_utilization_ratio": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100}


def _temperature_v(handle: Any) -> Values:
    celsius = pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU)
    return {"gpu_temperature_c": celsius}


def _temperature(handle: Any) -> Values:
    celsius = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
    return {"gpu_temperature_c": celsius}


def _throttled(handle: Any) -> Values:
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return {"gpu_throttled": float(bool(reasons & _THROTTLED))}


def _throttled_old(handle: Any) -> Values:
    """The same by the name it had before driver 535."""
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return {"gpu_throttled": float(bool(reasons & _THROTTLED))}


_SLOW_FIELDS: tuple[tuple[_Read, ...], ...] = (
    (_memory_v2, _memory),
    (_utilization,),
    (_temperature_v, _temperature),
    (_throttled, _throttled_old),
)

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


class _Gone(Exception):
    """A device does not answer any more."""


class _Device:
    """One GPU: its handle, what it supports, and its last energy reading."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.gpu = TargetGpu(
            name=pynvml.nvmlDeviceGetName(handle), uuid=pynvml.nvmlDeviceGetUUID(handle)
        )
        self._labels = (("gpu", self.gpu.uuid),)
        self._silent: set[_Read] = set()
        self._has_energy = True
        self._has_power = True
        self._energy: tuple[int, float] | None = None  # (at_ns, J) that power is reckoned from
        memory = self._ask(_SLOW_FIELDS[0]).get("gpu_memory_total_bytes")
        if memory:
            self.gpu = TargetGpu(self.gpu.name, self.gpu.uuid, int(memory))

    def read(self, slow: bool) -> list[Reading]:
        """Energy and power, and with `slow` the other fields. Raises _Gone."""
        energy = (
            self._call(pynvml.nvmlDeviceGetTotalEnergyConsumption) if self._has_energy else None
        )
        at_ns = time.monotonic_ns()
        values: Values = {}
        if isinstance(energy, int):
            values = self._power_from(at_ns, energy / 1000)
            if self._has_energy:
                values["gpu_energy_j"] = energy / 1000
        elif energy is _REFUSED:
            self._has_energy = False
        if not self._has_energy and self._has_power:
            values |= self._polled_power()
        if slow:
            for alternatives in _SLOW_FIELDS:
                values |= self._ask(alternatives)
        return [Reading(at_ns, name, value, self._labels) for name, value in values.items()]

    def _power_from(self, at_ns: int, joules: float) -> Values:
        """Mean power since the last reading; none over too short a span or across a reset."""
        before = self._energy
        if before is None or joules < before[1]:
            self._energy = (at_ns, joules)
            return {}
        span_ns = at_ns - before[0]
        if joules == before[1]:
            # No GPU draws 0 W: virtual ones have a counter that stays where it is.
            self._has_energy = span_ns < STILL_NS
            return {}
        if span_ns < POWER_SPAN_NS_MIN:
            return {}
        self._energy = (at_ns, joules)
        return {"gpu_power_w": (joules - before[1]) / (span_ns / 1e9)}

    def _polled_power(self) -> Values:
        milliwatts = self._call(pynvml.nvmlDeviceGetPowerUsage)
        if milliwatts is _REFUSED:
            self._has_power = False
        return {"gpu_power_w": milliwatts / 1000} if isinstance(milliwatts, int) else {}

    def _ask(self, alternatives: Sequence[_Read]) -> Values:
        for read in alternatives:
            if read in self._silent:
                continue
            answer = self._call(read)
            if answer is not _REFUSED:
                return answer or {}
            self._silent.add(read)
        return {}

    def _call(self, function: Callable[[Any], Any]) -> Any:
        """The driver's answer; None where it failed this once, _REFUSED where it always will."""
        try:
            return function(self.handle)
        except pynvml.NVMLError as error:
            if error.value in _GONE:
                raise _Gone(str(error)) from error
            return _REFUSED if error.value in _NEVER else None
        except AttributeError:  # a name that this release of pynvml does not have
            return _REFUSED


_REFUSED = object()


# ------------------------------------------------------------------------------------------ driver


class _Driver:
    """All use of NVML. Runs on the worker thread only."""

    def __init__(self, min_interval_s: float, only: frozenset[str] | None) -> None:
        self._min_interval_ns = int(min_interval_s * 1e9)
        self._only = only
        self._devices: list[_Device] = []
        self._lost: dict[str, str] = {}  # uuid → what the driver said
        self._slow_at_ns: int | None = None
        self._opened_at_ns = 0
        self._open = False

    def open(self) -> list[TargetGpu]:
        try:
            pynvml.nvmlInit()
            self._open = True
            self._opened_at_ns = time.monotonic_ns()
            self._devices = list(self._found())
        except pynvml.NVMLError as error:
            self.close()
            raise NvmlUnavailable(_why(error)) from error
        if not self._devices:
            self.close()
            raise NvmlUnavailable("the NVIDIA driver on this machine shows no GPU")
        return [device.gpu for device in self._devices]

    def _found(self) -> Iterator[_Device]:
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                device = _Device(pynvml.nvmlDeviceGetHandleByIndex(index))
            except (pynvml.NVMLError, _Gone):
                continue  # one that fell off the bus; the others are there
            if self._only is None or device.gpu.uuid in self._only:
                yield device

    def read(self) -> list[Reading]:
        if self._lost and time.monotonic_ns() - self._opened_at_ns > REOPEN_NS:
            self._reopen()
        now_ns = time.monotonic_ns()
        slow = self._slow_at_ns is None or now_ns - self._slow_at_ns >= self._min_interval_ns
        if slow:
            self._slow_at_ns = now_ns
        readings: list[Reading] = []
        for device in self._devices:
            try:
                readings += device.read(slow)
                self._lost.pop(device.gpu.uuid, None)
            except _Gone as gone:
                self._lost[device.gpu.uuid] = str(gone)
        if not readings and self._lost:
            uuid, why = next(iter(self._lost.items()))
            raise SamplerError(f"GPU {uuid} is gone: {why}")
        return readings

    def _reopen(self) -> None:
        """Starts NVML anew: after a reset or a new driver the old handles stay dead."""
        known = self._devices
        self.close()
        try:
            self.open()
        except NvmlUnavailable as error:
            self._devices, self._opened_at_ns = known, time.monotonic_ns()
            raise SamplerError(f"the GPU is gone: {error}") from error
        found = {device.gpu.uuid for device in self._devices}
        self._lost = {uuid: why for uuid, why in self._lost.items() if uuid not in found}

    def close(self) -> None:
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

    Energy and power are read at each call, the other fields at most every `min_interval_s`: the
    last sample of a level always has its energy. `deadline_s` bounds the wait for the driver; a
    call that hangs is left to its thread, and samples fail until it comes back. The constructor
    waits for the driver to start (seconds, on a machine without persistence mode) and raises
    NvmlUnavailable.
    """

    name = "nvml"

    def __init__(
        self,
        *,
        min_interval_s: float = 1.0,
        deadline_s: float = 2.0,
        start_deadline_s: float = 15.0,
        only: frozenset[str] | None = None,
    ) -> None:
        self._deadline_s = deadline_s
        self._driver = _Driver(min_interval_s, only)
        self._worker = _Worker("servefit-nvml")
        self._closed = False
        try:
            self._gpus = self._worker.submit(self._driver.open).result(start_deadline_s)
        except TimeoutError:
            self._worker.stop()
            raise NvmlUnavailable(
                f"the NVIDIA driver did not answer within {start_deadline_s:g} s"
            ) from None
        except BaseException:
            self._worker.stop()
            raise

    def devices(self) -> list[TargetGpu]:
        """The GPUs found at the start: name, UUID and memory."""
        return list(self._gpus)

    async def sample(self) -> list[Reading]:
        """The readings of now, each with the label gpu = UUID; a lost GPU has none."""
        stuck_s = self._worker.busy_s()
        if stuck_s is not None:
            raise SamplerError(f"the NVIDIA driver has not answered for {stuck_s:.0f} s")
        future = asyncio.wrap_future(self._worker.submit(self._driver.read))
        try:
            return await asyncio.wait_for(future, self._deadline_s)
        except TimeoutError:
            raise SamplerError(
                f"the NVIDIA driver did not answer within {self._deadline_s:g} s"
            ) from None

    async def close(self) -> None:
        """Lets the driver go; a driver that hangs is left to its thread."""
        if self._closed:
            return
        self._closed = True
        if self._worker.busy_s() is None:
            future = asyncio.wrap_future(self._worker.submit(self._driver.close))
            await asyncio.wait({future}, timeout=self._deadline_s)
        self._worker.stop()


class _Worker:
    """One daemon thread that runs one job at a time.

    Not an executor: those are joined at exit, and a hung driver would keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._since: float | None = None  # when the job under way was handed in
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def busy_s(self) -> float | None:
        """For how long a job has been under way; None when there is none."""
        since = self._since
        return None if since is None else time.monotonic() - since

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            try:
                result = function()
            except BaseException as error:
                self._since = None
                _settle(future, error=error)
            else:
                self._since = None
                _settle(future, result=result)

        self._since = time.monotonic()
        self._jobs.put(job)
        return future

    def stop(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _settle(future: Future[T], *, result: Any = None, error: BaseException | None = None) -> None:
    """Completes a future, unless whoever waited for it has gone."""
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
