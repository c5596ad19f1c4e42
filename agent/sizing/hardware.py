"""The catalogue of accelerators: what each one holds, moves and computes, with its sources.

The numbers stand in `data/gpus.csv`, one row a device, each with where it is from and how far it
can be trusted. They are data-sheet figures, dense and not sparse; what a device reaches of them is
`engine.Efficiencies`. A user's own file of the same form adds to them (`read_gpus`).
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources

import msgspec

from agent.model import UsageError

GIB = 2**30

# Both directions together, as NVLink's figures are too; x16 lanes (PCI-SIG base specifications).
_PCIE_BYTES_PER_S = {"PCIe3": 32e9, "PCIe4": 64e9, "PCIe5": 128e9}

# How a precision of the weights computes: the first of these rates that the device has. Weights
# in int4, and fp8 or fp4 weights on a device without such units, are unpacked to 16 bits first.
_RATES = {
    "bf16": ("bf16",),
    "fp16": ("bf16",),
    "fp8": ("fp8", "bf16"),
    "int8": ("fp8", "bf16"),
    "int4": ("bf16",),
    "fp4": ("fp4", "bf16"),
    "mxfp4": ("fp4", "bf16"),
}


# What tables and engines call the same.
_CALLED = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "bf16/fp16": "bf16", "fp16/bf16": "bf16",
    "float8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "nvfp4": "fp4", "w8a8": "int8",
    "w4a16": "int4", "awq": "int4", "gptq": "int4",
}  # fmt: skip


def precision(name: str) -> str:
    """A precision by the name that everything here knows it by: bf16 of `BFloat16`.

    A name that nothing is known of is left as it is, for whoever has the table to refuse it.
    """
    key = name.strip().lower()
    return _CALLED.get(key, key)


class Gpu(msgspec.Struct, frozen=True):
    """One device of the catalogue. A figure that is not known is None."""

    name: str
    vendor: str
    arch: str
    category: str  # training-class, inference-class, consumer, workstation, unified-memory, edge
    memory_bytes: float  # GiB per listed GB: an 80 GB card holds 80 · 2³⁰ less the driver's part
    memory_type: str
    bandwidth_bytes_per_s: float
    flops: dict[str, float]  # FLOP/s, dense, by precision: bf16, fp8, fp4 where there are units
    tdp_w: float | None
    interconnect: str
    interconnect_bytes_per_s: float | None  # both directions together
    price_low_usd_per_h: float | None
    price_typical_usd_per_h: float | None
    price_high_usd_per_h: float | None
    price_basis: str
    spec_source: str
    spec_confidence: str  # high, medium, low
    notes: str

    def flops_per_s(self, precision: str) -> float:
        """FLOP/s that a matrix product with weights of this precision runs at.

        Raises UsageError for a precision nobody serves in, or a device whose rate is not known.
        """
        rates = _RATES.get(precision)
        if rates is None:
            raise UsageError(unknown("precision", precision, _RATES))
        for rate in rates:
            if rate in self.flops:
                return self.flops[rate]
        raise UsageError(f"{self.name}: its {precision} FLOP/s are not in the catalogue")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`unknown GPU 'h1000'; did you mean H100-…?`: the text for a name that is not in a table."""
    by_key = {_key(entry): entry for entry in known}
    near = difflib.get_close_matches(_key(name), by_key, n=3, cutoff=0.4)
    hint = ", ".join(by_key[key] for key in near) or ", ".join(sorted(by_key.values()))
    return f"unknown {what} {name!r}; did you mean {hint}?"


def pick(what: str, name: str, known: Iterable[str]) -> str:
    """The entry of `known` that `name` means: the same name, or a short form of only one.

    Case does not matter. A short form is some of the name's parts in their order: `h100-sxm` is
    H100-SXM-80GB, `4090` is RTX-4090; `l4` is L4 and never L40. Of several the one that all others
    only add to is meant: `qwen3-30b` is Qwen3-30B-A3B, not Qwen3-Coder-30B-A3B. Raises UsageError
    that lists the candidates where none is, and the nearest names where it fits none.
    """
    found = _meant(name, known)
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{what} {name!r} could be {' or '.join(sorted(found))}: say which")
    raise UsageError(unknown(what, name, known))


def _meant(name: str, known: Iterable[str]) -> list[str]:
    """Every entry that a name may be of."""
    by_key = {_key(entry): entry for entry in known}
    key = _key(name)
    if key in by_key:
        return [by_key[key]]
    fit = [full for full in by_key if _is_short_for(key, full)]
    plain = [full for full in fit if all(_is_short_for(full, other) for other in fit)]
    return [by_key[full] for full in plain or fit]


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def _is_short_for(short: str, full: str) -> bool:
    """Are the parts of `short` among those of `full`, in order? `80` stands for `80gb` too."""
    rest = iter(full.split("-"))
    return bool(short) and all(
        any(part in (have, have.removesuffix("gb")) for have in rest) for part in short.split("-")
    )


def _link_bytes_per_s(text: str) -> float | None:
    """Bytes/s of an interconnect described as `NVLink4 900 GB/s` or `PCIe4 (+bridge)`."""
    stated = re.search(r"([\d.]+) (GB|TB|Gb)/s", text)
    if stated and not text.startswith("PCIe"):
        return float(stated[1]) * {"GB": 1e9, "TB": 1e12, "Gb": 1e9 / 8}[stated[2]]
    return next((rate for name, rate in _PCIE_BYTES_PER_S.items() if name in text), None)


# Columns of a catalogue: what a device cannot do without, what may be empty, and words.
_NEEDED = ("memory_gb", "bandwidth_gbs")
_NUMBERS = (
    "bf16_dense_tflops", "fp8_dense_tflops", "fp4_dense_tflops", "tdp_w",
    "price_low_usd_h", "price_typ_usd_h", "price_high_usd_h",
)  # fmt: skip
_WORDS = (
    "gpu", "vendor", "arch", "class", "mem_type", "interconnect", "price_basis", "spec_source",
    "spec_confidence", "notes",
)  # fmt: skip


def _number(row: Mapping[str, str], column: str) -> float | None:
    text = row[column]
    if not text and column not in _NEEDED:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{column} should be a number above 0, not {text!r}")
    return value


def _parse(row: Mapping[str, str]) -> Gpu:
    """One row. Raises ValueError naming the column that does not hold what it should."""
    for column in ("gpu", "vendor"):
        if not row[column]:
            raise ValueError(f"{column} is empty")
    at = {column: _number(row, column) for column in (*_NEEDED, *_NUMBERS)}
    tflops = {name: at[f"{name}_dense_tflops"] for name in ("bf16", "fp8", "fp4")}
    return Gpu(
        name=row["gpu"],
        vendor=row["vendor"],
        arch=row["arch"],
        category=row["class"],
        memory_bytes=(at["memory_gb"] or 0.0) * GIB,
        memory_type=row["mem_type"],
        bandwidth_bytes_per_s=(at["bandwidth_gbs"] or 0.0) * 1e9,
        flops={name: value * 1e12 for name, value in tflops.items() if value is not None},
        tdp_w=at["tdp_w"],
        interconnect=row["interconnect"],
        interconnect_bytes_per_s=_link_bytes_per_s(row["interconnect"]),
        price_low_usd_per_h=at["price_low_usd_h"],
        price_typical_usd_per_h=at["price_typ_usd_h"],
        price_high_usd_per_h=at["price_high_usd_h"],
        price_basis=row["price_basis"],
        spec_source=row["spec_source"],
        spec_confidence=row["spec_confidence"],
        notes=row["notes"],
    )


def read_gpus(text: str) -> dict[str, Gpu]:
    """A catalogue as CSV, by name: the columns of `data/gpus.csv` in any order.

    `gpu`, `vendor`, `memory_gb` and `bandwidth_gbs` have to be there, the rest is known or not.
    Lines that begin with `#` are comments. Raises UsageError that says of every bad line what is
    wrong with it.
    """
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if _is_row(line)]
    rows = csv.reader(line for _, line in lines)
    header = [title.strip() for title in next(rows, [])]
    known = (*_WORDS, *_NEEDED, *_NUMBERS)
    missing = [column for column in ("gpu", "vendor", *_NEEDED) if column not in header]
    if missing:
        raise UsageError(f"no column {', '.join(missing)} in the first line")
    if strange := [column for column in header if column not in known]:
        raise UsageError(unknown("column", strange[0], known))
    found: dict[str, Gpu] = {}
    wrong: list[str] = []
    for (number, _), cells in zip(lines[1:], rows, strict=False):
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} fields, the first line has {len(header)}")
            values = (cell.strip() for cell in cells)
            device = _parse(dict.fromkeys(known, "") | dict(zip(header, values, strict=True)))
            if device.name in found:
                raise ValueError(f"{device.name} stands there twice")
            found[device.name] = device
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        raise UsageError("; ".join(wrong))
    return found


def _is_row(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


@cache
def gpus() -> dict[str, Gpu]:
    """The whole catalogue by name, in the order of the file."""
    file = resources.files("agent.sizing").joinpath("data/gpus.csv")
    return read_gpus(file.read_text(encoding="utf-8"))


def gpu(name: str, own: Mapping[str, Gpu] | None = None) -> Gpu:
    """The device that `name` means; see `pick` for short forms. Raises UsageError.

    Drivers' and shops' names will do too: `NVIDIA GeForce RTX 4090`, `H100 SXM5`, `rtx4090`.
    `own` are a user's devices; one that is called as one of the catalogue takes its place.
    """
    known = {**gpus(), **(own or {})}
    driven = _driven(name, known)
    forms = (form for form in (driven, name, _bare(name)) if form and _meant(form, known))
    return known[pick("GPU", next(forms, name), known)]


# What is no part of a name in the catalogue; the generation of a socket is, of a few.
_MAKER = re.compile(r"(?i)\b(nvidia|tesla|geforce|amd|instinct|radeon|oam)\b|\?")
_SOCKET = re.compile(r"(?i)[\s_-]*(sxm|pcie|nvl)\d?\b")
_SERIES = re.compile(r"(?i)\b(rtx|mi|gaudi|jetson)[\s_-]*(?=\d)")


def _bare(name: str) -> str:
    """A name without its maker's, and divided as those of the catalogue are."""
    bare = _SOCKET.sub(r"-\1", _MAKER.sub(" ", name))
    return _SERIES.sub(lambda m: f"{m[1]}-" if m[1].lower() == "rtx" else m[1], bare).strip(" -")


# What a driver calls a device (NVML, amd-smi), where the catalogue calls it otherwise.
_DRIVER_NAMES = {
    "NVIDIA H100 80GB HBM3": "H100-SXM-80GB",
    "NVIDIA H100 PCIe": "H100-PCIe-80GB",
    "NVIDIA H100 NVL": "H100-NVL-94GB",
    "NVIDIA H200": "H200-SXM-141GB",
    "NVIDIA H200 NVL": "H200-NVL-141GB",
    "NVIDIA GH200 480GB": "GH200-96GB",
    "NVIDIA B200": "B200-SXM-180GB",
    "NVIDIA B300 SXM6 AC": "B300-SXM",
    "NVIDIA A100-SXM4-80GB": "A100-SXM-80GB",
    "NVIDIA A100-SXM4-40GB": "A100-SXM-40GB",
    "NVIDIA A100 80GB PCIe": "A100-PCIe-80GB",
    "NVIDIA RTX 6000 Ada Generation": "RTX-6000-Ada",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX-PRO-6000",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "RTX-PRO-6000-Max-Q",
    "NVIDIA GB10": "DGX-Spark-GB10",
    "NVIDIA Thor": "Jetson-AGX-Thor",
}


def device(name: str, own: Mapping[str, Gpu] | None = None) -> Gpu | None:
    """The device that a driver calls `name`: `NVIDIA GeForce RTX 4090`, `AMD Instinct MI300X`.

    None where the catalogue does not have exactly that one: a near one would be another.
    """
    known = {**gpus(), **(own or {})}
    entry = _driven(name, known)
    return known[entry] if entry else None


def _driven(name: str, known: Iterable[str]) -> str | None:
    """The entry that a driver calls `name`, with or without the maker's name before it."""
    by_key = {_key(entry): entry for entry in known}
    named = {_key(driver): entry for driver, entry in _DRIVER_NAMES.items()}
    key = _key(name)
    entry = named.get(key) or named.get(f"nvidia-{key}")
    return entry or by_key.get(_key(_MAKER.sub("", name)).strip("-"))
