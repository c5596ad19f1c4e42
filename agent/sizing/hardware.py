"""The catalogue of accelerators: what each one holds, moves and computes, with its sources.

The numbers stand in `data/gpus.csv`, one row a device, each with where it is from and how far it
can be trusted. They are data-sheet figures, dense and not sparse; what a device reaches of them is
`engine.Efficiencies`.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterable
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
    tdp_w: float
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
    H100-SXM-80GB, `4090` is RTX-4090; `l4` is L4 and never L40. Raises UsageError that lists the
    candidates where it fits several, and the nearest names where it fits none.
    """
    by_key = {_key(entry): entry for entry in known}
    key = _key(name)
    if key in by_key:
        return by_key[key]
    found = [entry for full, entry in by_key.items() if _is_short_for(key, full)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{what} {name!r} could be {' or '.join(sorted(found))}: say which")
    raise UsageError(unknown(what, name, by_key.values()))


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def _is_short_for(short: str, full: str) -> bool:
    """Are the parts of `short` among those of `full`, in order? `80` stands for `80gb` too."""
    rest = iter(full.split("-"))
    return bool(short) and all(
        any(part in (have, have.removesuffix("gb")) for have in rest) for part in short.split("-")
    )


def _number(text: str) -> float | None:
    return float(text) if text.strip() else None


def _link_bytes_per_s(text: str) -> float | None:
    """Bytes/s of an interconnect described as `NVLink4 900 GB/s` or `PCIe4 (+bridge)`."""
    stated = re.search(r"([\d.]+) (GB|TB|Gb)/s", text)
    if stated and not text.startswith("PCIe"):
        return float(stated[1]) * {"GB": 1e9, "TB": 1e12, "Gb": 1e9 / 8}[stated[2]]
    return next((rate for name, rate in _PCIE_BYTES_PER_S.items() if name in text), None)


def _parse(row: dict[str, str]) -> Gpu:
    tflops = {name: _number(row[f"{name}_dense_tflops"]) for name in ("bf16", "fp8", "fp4")}
    return Gpu(
        name=row["gpu"],
        vendor=row["vendor"],
        arch=row["arch"],
        category=row["class"],
        memory_bytes=float(row["memory_gb"]) * GIB,
        memory_type=row["mem_type"],
        bandwidth_bytes_per_s=float(row["bandwidth_gbs"]) * 1e9,
        flops={name: value * 1e12 for name, value in tflops.items() if value is not None},
        tdp_w=float(row["tdp_w"]),
        interconnect=row["interconnect"],
        interconnect_bytes_per_s=_link_bytes_per_s(row["interconnect"]),
        price_low_usd_per_h=_number(row["price_low_usd_h"]),
        price_typical_usd_per_h=_number(row["price_typ_usd_h"]),
        price_high_usd_per_h=_number(row["price_high_usd_h"]),
        price_basis=row["price_basis"],
        spec_source=row["spec_source"],
        spec_confidence=row["spec_confidence"],
        notes=row["notes"],
    )


@cache
def gpus() -> dict[str, Gpu]:
    """The whole catalogue by name, in the order of the file."""
    text = resources.files("agent.sizing").joinpath("data/gpus.csv").read_text(encoding="utf-8")
    return {row["gpu"]: _parse(row) for row in csv.DictReader(text.splitlines())}


def gpu(name: str) -> Gpu:
    """The device that `name` means; see `pick` for short forms. Raises UsageError."""
    return gpus()[pick("GPU", name, gpus())]
