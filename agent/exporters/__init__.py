"""What leaves the agent: one module per format, and the outbox that they are sent from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from agent.metrics import CATALOGUE
from agent.model import Reading

TEXT_CHARS_MAX = 4096  # of a label; a page may hold anything


class Batch(msgspec.Struct, frozen=True):
    """What one source said last: a configured server, this machine's GPUs, the agent itself.

    `labels` go to every series of the source, beside `source` and each reading's own: `model`,
    `engine`, `service`, `address`, `port`, or any other. A reading's own label of the same name
    wins.
    """

    source: str
    readings: Sequence[Reading]
    labels: tuple[tuple[str, str], ...] = ()


class Known(NamedTuple):
    """What holds whenever it is asked for, unlike a sample: a verdict, a curve, a target."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...]


def known_batch(at_ns: int, known: Iterable[Known]) -> Batch:
    """Such things as of now. The batch is no sampler's, so that no window takes it for samples."""
    return Batch("assessment", [Reading(at_ns, *one) for one in known])


def labels_of(batch: Batch, reading: Reading) -> dict[str, str]:
    """All labels of one reading, each as text that can be encoded, sorted by name."""
    given = {"source": batch.source, **dict(batch.labels), **dict(reading.labels)}
    return {name: encodable(given[name]) for name in sorted(given)}


def encodable(text: str) -> str:
    """A page may hold anything; half of a surrogate pair has no UTF-8 and no back end."""
    return text[:TEXT_CHARS_MAX].encode("utf-8", "replace").decode("utf-8")


HISTOGRAM_PARTS = ("_sum", "_count", "_bucket")


def histogram_of(name: str) -> tuple[str, str] | None:
    """A histogram's canonical name and which part of it `name` is; None for any other series."""
    for part in HISTOGRAM_PARTS:
        base = name.removesuffix(part)
        if base != name and f"{base}_sum" in CATALOGUE:
            return base, part[1:]
    return None


def help_of(canonical: str) -> str:
    """What a series, or a whole histogram, means."""
    entry = CATALOGUE.get(canonical) or CATALOGUE[f"{canonical}_sum"]
    return entry.help if canonical in CATALOGUE else entry.help.replace(", summed", "")
