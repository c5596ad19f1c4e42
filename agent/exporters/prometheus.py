"""The agent's own /metrics page: everything in the catalogue, as text for Prometheus.

One family per series of the catalogue, `servefit_` in front and, as Prometheus wants it, `_total`
behind a counter; sum, count and buckets of a histogram are one family. Plain text 0.0.4 or, where
it is asked for, OpenMetrics 1.0. Whatever a server wrote into its labels comes out as a label's
value and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal

from agent.exporters import Batch, encodable, help_of, histogram_of, labels_of
from agent.metrics import CATALOGUE
from agent.model import Reading

Format = Literal["text", "openmetrics"]
Type = Literal["gauge", "counter", "histogram", "summary"]

CONTENT_TYPE: dict[Format, str] = {
    "text": "text/plain; version=0.0.4; charset=utf-8",
    "openmetrics": "application/openmetrics-text; version=1.0.0; charset=utf-8",
}
PREFIX = "servefit_"
# How a family's name may end to have a unit by OpenMetrics' rule.
_UNITS = ("bytes", "seconds", "ratio", "tokens", "celsius", "w", "j", "c", "s", "hz")
_NOT_IN_LABEL = re.compile(r"[^a-zA-Z0-9_]")

_Labels = tuple[tuple[str, str], ...]


def family(canonical: str) -> str:
    """The name of a series' family: without `_total`, and for a histogram without its part."""
    part = histogram_of(canonical)
    return PREFIX + (part[0] if part else canonical.removesuffix("_total"))


def sample_name(canonical: str) -> str:
    """What a series is called on the page; in both formats the same."""
    if histogram_of(canonical) or CATALOGUE[canonical].kind != "counter":
        return PREFIX + canonical
    return f"{family(canonical)}_total"


def negotiate(accept: str | None) -> Format:
    """The format that an Accept header prefers; plain text where it has no wish."""
    wishes = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for part in (accept or "").split(","):
        form, *parameters = (piece.strip() for piece in part.split(";"))
        if form.lower() in wishes:
            wishes[form.lower()] = max(wishes[form.lower()], _quality(parameters))
    wants_open = wishes["application/openmetrics-text"] > wishes["text/plain"]
    return "openmetrics" if wants_open else "text"


def _quality(parameters: Iterable[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                quality = float(value)
            except ValueError:
                return 0.0
            return quality if 0 <= quality <= 1 else 0.0
    return 1.0


def page(batches: Iterable[Batch], form: Format = "text") -> bytes:
    """The page of the readings given, which are the newest of each source.

    A series read twice is written once, with its last value; what is not in the catalogue is left
    out. The order is that of the catalogue, then of the labels.
    """
    families: dict[str, dict[tuple[str, _Labels], float]] = {}
    for batch in batches:
        for reading in batch.readings:
            if reading.name in CATALOGUE or histogram_of(reading.name):
                key = (sample_name(reading.name), _labels(batch, reading))
                families.setdefault(family(reading.name), {})[key] = reading.value
    lines: list[str] = []
    for name in _ORDER:
        if name in families:
            lines += _family(name, families[name], form)
    if form == "openmetrics":
        lines.append("# EOF")
    return ("\n".join(lines) + "\n").encode("utf-8")


_ENTRIES = {family(entry.name): entry for entry in reversed(CATALOGUE.values())}
_ORDER = list(reversed(_ENTRIES))


def _labels(batch: Batch, reading: Reading) -> _Labels:
    """Label names as Prometheus takes them; a name that is none becomes one."""
    found = {_label_name(name): value for name, value in labels_of(batch, reading).items()}
    return tuple(found.items())


@lru_cache(maxsize=1024)
def _label_name(name: str) -> str:
    cleaned = _NOT_IN_LABEL.sub("_", name)
    if not cleaned or cleaned[0].isdigit():
        cleaned = f"_{cleaned}"
    return f"label{cleaned}" if cleaned.startswith("__") else cleaned  # reserved


def _family(name: str, samples: dict[tuple[str, _Labels], float], form: Format) -> list[str]:
    entry = _ENTRIES[name]
    type_ = _type(name, samples)
    # The text format names a counter's family with its _total, OpenMetrics without.
    shown = f"{name}_total" if type_ == "counter" and form == "text" else name
    lines = [f"# HELP {shown} {_escaped_help(_help(entry.name), form)}", f"# TYPE {shown} {type_}"]
    unit = name.rpartition("_")[2]
    if form == "openmetrics" and unit in _UNITS:
        lines.append(f"# UNIT {shown} {unit}")
    if type_ in ("histogram", "summary"):
        ordered = _grouped(name, samples)
    else:
        ordered = sorted(samples.items())
    return lines + [
        f"{sample}{_braced(labels)} {_number(value)}" for (sample, labels), value in ordered
    ]


def _help(canonical: str) -> str:
    part = histogram_of(canonical)
    return help_of(part[0] if part else canonical)


def _type(name: str, samples: Iterable[tuple[str, _Labels]]) -> Type:
    entry = _ENTRIES[name]
    if not histogram_of(entry.name):
        return entry.kind
    has_buckets = any(sample.endswith("_bucket") for sample, _ in samples)
    return "histogram" if has_buckets else "summary"


def _grouped(
    name: str, samples: dict[tuple[str, _Labels], float]
) -> list[tuple[tuple[str, _Labels], float]]:
    """Histogram by histogram, the buckets by their bound, the infinite one always there.

    Of several sources only some may have buckets; one without gets the bucket that holds all.
    """
    kept = dict(samples)
    if any(sample == f"{name}_bucket" for sample, _ in samples):
        for (sample, labels), value in samples.items():
            if sample == f"{name}_count":
                every = tuple(sorted((*labels, ("le", "+Inf"))))
                kept.setdefault((f"{name}_bucket", every), value)

    def place(item: tuple[tuple[str, _Labels], float]) -> tuple[_Labels, str, float]:
        (sample, labels), _ = item
        others = tuple(pair for pair in labels if pair[0] != "le")
        return others, sample, _bound(dict(labels).get("le", "+Inf"))

    return sorted(kept.items(), key=place)


def _bound(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _braced(labels: Sequence[tuple[str, str]]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escaped_help(text: str, form: Format) -> str:
    shown = encodable(text).replace("\\", "\\\\").replace("\n", "\\n")
    return shown.replace('"', '\\"') if form == "openmetrics" else shown


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value)) if value != int(value) or abs(value) >= 2**53 else str(int(value))
