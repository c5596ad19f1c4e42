"""GPUs of another machine, from the page of NVIDIA's dcgm-exporter.

The exporter asks its driver at an interval of its own (30 s by default) and repeats itself between;
power is therefore what it polled, and energy is the counter, whichever of its instants it is from.
Under MIG it writes the whole GPU's energy, power, clocks and temperature once per instance: they
are taken once.
"""

from __future__ import annotations

import ssl as tls
from collections.abc import Iterable, Mapping

import msgspec

from agent.model import Reading, TargetGpu
from agent.samplers import SamplerError
from agent.samplers.exposition import Page, Sample
from agent.samplers.server import ServerSampler

MIB = 1024 * 1024

# From here up lie DCGM's marks for blank, not found, not supported and no permission (2^63 − 16 …);
# a float cannot tell them apart. Its marks for fractions begin at 2^47.
BLANK_MIN = 9.2233720368547758e18
_BLANK_FRACTIONS = range(1 << 47, (1 << 47) + 16)


class _Field(msgspec.Struct, frozen=True):
    """Where one series is found. `whole`: it belongs to the whole GPU, also under MIG."""

    name: str
    factor: float = 1.0
    whole: bool = True


_FIELDS: dict[str, _Field] = {
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": _Field("gpu_energy_j", 1e-3),
    "DCGM_FI_DEV_POWER_USAGE": _Field("gpu_power_w"),
    "DCGM_FI_DEV_GPU_TEMP": _Field("gpu_temperature_c"),
    "DCGM_FI_DEV_SM_CLOCK": _Field("gpu_sm_clock_hz", 1e6),
    "DCGM_FI_DEV_MEM_CLOCK": _Field("gpu_memory_clock_hz", 1e6),
    "DCGM_FI_DEV_XID_ERRORS": _Field("gpu_last_xid"),
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": _Field("gpu_pcie_replays_total"),
    "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL": _Field("gpu_ecc_corrected_total"),
    "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": _Field("gpu_ecc_uncorrected_total"),
    "DCGM_FI_DEV_GPU_UTIL": _Field("gpu_utilization_ratio", 0.01, whole=False),
    "DCGM_FI_DEV_MEM_COPY_UTIL": _Field("gpu_memory_busy_ratio", 0.01, whole=False),
    "DCGM_FI_PROF_SM_OCCUPANCY": _Field("gpu_sm_occupancy_ratio", whole=False),
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": _Field("gpu_tensor_active_ratio", whole=False),
    "DCGM_FI_PROF_DRAM_ACTIVE": _Field("gpu_dram_active_ratio", whole=False),
    "DCGM_FI_PROF_PCIE_TX_BYTES": _Field("gpu_pcie_sent_bytes_per_s", whole=False),
    "DCGM_FI_PROF_PCIE_RX_BYTES": _Field("gpu_pcie_received_bytes_per_s", whole=False),
}
_MEMORY = ("DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_RESERVED")
_WANTED = frozenset(name.encode() for name in (*_FIELDS, *_MEMORY))

Label = tuple[str, str]


class _Rows:
    """The rows of one GPU, or of one MIG instance on it: series → value."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.uuid = _uuid(labels)
        self.instance = labels.get("GPU_I_ID") or None
        self.model = labels.get("modelName") or "NVIDIA GPU"
        self.values: dict[str, float] = {}


def _uuid(labels: Mapping[str, str]) -> str:
    """The GPU's UUID; without one (an old exporter's option) its place: host and number."""
    uuid = labels.get("UUID") or labels.get("uuid")
    return uuid or ":".join((labels.get("Hostname", ""), labels.get("gpu", "")))


def empty_page() -> Page:
    """A page that keeps the exporter's lines."""
    return Page(_WANTED)


def parse(page: Page, at_ns: int) -> tuple[list[Reading], list[TargetGpu]]:
    """The readings of a whole page, and the GPUs it speaks of.

    Rows that repeat one (an exporter that names pods writes a shared GPU once per pod) count once.
    SamplerError where the page is not an exporter's.
    """
    rows = _rows(one for one in page.read() if _is_value(one.value))
    if not rows:
        raise SamplerError("no GPU of dcgm-exporter on this page (no DCGM_FI_… series)")
    gpus: dict[str, TargetGpu] = {}
    found: dict[tuple[str, tuple[Label, ...]], float] = {}
    for row in rows:
        for name, value in _of_gpu(row):
            found.setdefault((name, (("gpu", row.uuid),)), value)
        memory = _memory(row)
        found |= _memory_readings(row, memory)
        if row.instance is None or row.uuid not in gpus:
            total = int(memory["total"]) if row.instance is None and "total" in memory else None
            gpus[row.uuid] = TargetGpu(row.model, row.uuid, total)
    readings = [Reading(at_ns, name, value, labels) for (name, labels), value in found.items()]
    return readings, list(gpus.values())


def _is_value(value: float) -> bool:
    return 0 <= value < BLANK_MIN and value not in _BLANK_FRACTIONS


def _rows(samples: Iterable[Sample]) -> list[_Rows]:
    """Whole GPUs first, so that what they say of themselves goes before what instances say."""
    rows: dict[tuple[str, str | None], _Rows] = {}
    for one in samples:
        key = (_uuid(one.labels), one.labels.get("GPU_I_ID") or None)
        if key not in rows:
            rows[key] = _Rows(one.labels)
        rows[key].values.setdefault(one.name, one.value)
    return sorted(rows.values(), key=lambda row: row.instance is not None)


def _of_gpu(row: _Rows) -> Iterable[tuple[str, float]]:
    for series, field in _FIELDS.items():
        if series in row.values and (field.whole or row.instance is None):
            yield field.name, row.values[series] * field.factor
    if "DCGM_FI_DEV_POWER_USAGE" in row.values:
        yield "gpu_power_polled", 1.0


def _memory(row: _Rows) -> dict[str, float]:
    """used, total and reserved in bytes, as far as the page has them. Reserved was not always."""
    used, free, reserved = (row.values.get(series) for series in _MEMORY)
    found: dict[str, float] = {}
    if used is not None:
        found["used"] = used * MIB
    if reserved is not None:
        found["reserved"] = reserved * MIB
    if used is not None and free is not None:
        found["total"] = (used + free + (reserved or 0)) * MIB
    return found


def _memory_readings(
    row: _Rows, memory: Mapping[str, float]
) -> dict[tuple[str, tuple[Label, ...]], float]:
    if row.instance is None:
        of_gpu = (("gpu", row.uuid),)
        return {(f"gpu_memory_{part}_bytes", of_gpu): value for part, value in memory.items()}
    of_instance = (("gpu", row.uuid), ("mig", row.instance))
    return {
        (f"mig_memory_{part}_bytes", of_instance): memory[part]
        for part in ("used", "total")
        if part in memory
    }


# ----------------------------------------------------------------------------------------- sampler


class DcgmSampler:
    """The GPUs on an exporter's page, or those whose UUID is in `only`.

    The page is fetched under the limits of every metrics page (`agent.samplers.server`). A MIG
    instance is known by the exporter's number of it, because the page has no UUID for it.
    """

    name = "dcgm"

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 5.0,
        ssl: tls.SSLContext | bool = True,
        only: frozenset[str] | None = None,
    ) -> None:
        self._page = ServerSampler(url, headers=headers, timeout_s=timeout_s, ssl=ssl)
        self._only = only
        self._gpus: list[TargetGpu] = []

    def devices(self) -> list[TargetGpu]:
        """The GPUs of the newest page."""
        return list(self._gpus)

    async def sample(self) -> list[Reading]:
        """The readings of one scrape, each with the label gpu = UUID."""
        page = empty_page()
        at_ns = await self._page.fill(page)
        readings, gpus = parse(page, at_ns)
        self._gpus = [gpu for gpu in gpus if self._is_wanted(gpu.uuid)]
        return [one for one in readings if self._is_wanted(dict(one.labels)["gpu"])]

    async def close(self) -> None:
        await self._page.close()

    def _is_wanted(self, uuid: str) -> bool:
        return self._only is None or uuid in self._only
