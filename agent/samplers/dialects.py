"""What inference servers call things: tables of names, and a reader of Prometheus text.

A dialect is a table from our canonical names (`agent.metrics`) to the names a server uses. Adding
a server means adding a table. The reader looks at a line's name as bytes and parses the few lines
that a table asks for: of the ~600 lines of a vLLM page some 30 are kept, which makes it two orders
of magnitude cheaper than parsing the whole page. What is not on a page is simply not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from agent.metrics import CATALOGUE
from agent.model import Reading

LINE_BYTES_MAX = 64 * 1024  # vLLM's longest line, cache_config_info, has 1.5 kB
KEPT_LINES_MAX = 20_000  # a page with more of the wanted series than this is no server's own

# ---------------------------------------------------------------------------------------- tables

Aggregate = Literal["sum", "mean", "max"]


class Series(msgspec.Struct, frozen=True):
    """Where one canonical series is found on a page.

    `names`: newest first; the first that is on the page is read and the others are left alone,
    because servers keep old names beside new ones for a while. A counter's `_total` is optional.
    `aggregate`: how the label sets (ranks, finish reasons) become one value: counts are summed,
    fractions averaged. `scale`: factor to the catalogue's unit.
    """

    names: tuple[str, ...]
    aggregate: Aggregate = "sum"
    scale: float = 1.0


class FromLabels(msgspec.Struct, frozen=True):
    """A figure that a server writes into labels: the product of `labels` of series `name`."""

    name: str
    labels: tuple[str, ...]
    aggregate: Aggregate


class Dialect(msgspec.Struct, frozen=True):
    """One server's table. `marks`: beginnings of series names that only this server has."""

    name: str
    marks: tuple[str, ...]
    series: dict[str, Series]
    from_labels: dict[str, tuple[FromLabels, ...]] = {}  # alternatives, best first
    model_label: str = "model_name"


def _histogram(canonical: str, *names: str) -> dict[str, Series]:
    """Sum and count of a histogram: enough for means over any span, whatever its buckets."""
    return {
        f"{canonical}_{part}": Series(tuple(f"{name}_{part}" for name in names))
        for part in ("sum", "count")
    }


VLLM = Dialect(
    name="vllm",
    marks=("vllm:",),
    series={
        "requests_running": Series(("vllm:num_requests_running",)),
        "requests_waiting": Series(("vllm:num_requests_waiting",)),
        "kv_usage_ratio": Series(
            ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"), aggregate="mean"
        ),
        "requests_finished_total": Series(("vllm:request_success",)),
        "prompt_tokens_total": Series(("vllm:prompt_tokens",)),
        "output_tokens_total": Series(("vllm:generation_tokens",)),
        "preemptions_total": Series(("vllm:num_preemptions",)),
        "prefix_cache_queries_total": Series(
            ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries")
        ),
        "prefix_cache_hits_total": Series(("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits")),
        **_histogram(
            "queue_seconds", "vllm:request_queue_time_seconds", "vllm:time_in_queue_requests"
        ),
        **_histogram("prefill_seconds", "vllm:request_prefill_time_seconds"),
        **_histogram("decode_seconds", "vllm:request_decode_time_seconds"),
        **_histogram("ttft_seconds", "vllm:time_to_first_token_seconds"),
        **_histogram(
            "itl_seconds",
            "vllm:inter_token_latency_seconds",
            "vllm:time_per_output_token_seconds",
        ),
        **_histogram("e2e_seconds", "vllm:e2e_request_latency_seconds"),
        "server_start_unix_s": Series(("process_start_time_seconds",), aggregate="max"),
    },
    from_labels={
        "kv_capacity_tokens": (
            # Each data-parallel rank writes its own capacity …
            FromLabels("vllm:cache_config_info", ("kv_cache_size_tokens",), "sum"),
            # … but num_gpu_blocks is summed over the ranks before every rank writes it.
            FromLabels("vllm:cache_config_info", ("num_gpu_blocks", "block_size"), "max"),
        )
    },
)

DIALECTS: tuple[Dialect, ...] = (VLLM,)


def _page_names(dialect: Dialect) -> Iterable[str]:
    for canonical, series in dialect.series.items():
        yield from series.names
        if CATALOGUE[canonical].kind == "counter":
            yield from (f"{name}_total" for name in series.names)
    for alternatives in dialect.from_labels.values():
        yield from (one.name for one in alternatives)


_WANTED: dict[str, frozenset[bytes]] = {
    dialect.name: frozenset(name.encode() for name in _page_names(dialect)) for dialect in DIALECTS
}

# --------------------------------------------------------------------------------- lines of a page


class Sample(msgspec.Struct, frozen=True):
    """One line of a page. The timestamp that a line may carry is read over."""

    name: str
    labels: dict[str, str]
    value: float


_QUOTED = rb'"((?:[^"\\]++|\\.)*+)"'
# name, then an optional {…} in which a brace or a blank may stand inside quotes, then the rest
_LINE = re.compile(
    rb'[ \t]*([a-zA-Z_:][a-zA-Z0-9_:]*)[ \t]*(?:\{((?:[^"}]++|' + _QUOTED + rb")*+)\})?[ \t]*(.*)"
)
_LABEL = re.compile(rb"[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*" + _QUOTED + rb"[ \t]*(,|$)")
_NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|Inf|NaN)$", re.I)
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", '"': '"', "\\": "\\"}


def read_line(line: bytes) -> Sample | None:
    """One sample of the text format 0.0.4 or of OpenMetrics 1.0; None where it is malformed."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    name, inside, _, rest = match.groups()
    words = rest.split(b"#", 1)[0].split()  # an exemplar follows a '#'
    if not 1 <= len(words) <= 2 or not all(_NUMBER.match(word) for word in words):
        return None
    labels = _labels(inside or b"")
    return None if labels is None else Sample(name.decode(), labels, float(words[0]))


def _labels(inside: bytes) -> dict[str, str] | None:
    labels: dict[str, str] = {}
    at, end = 0, len(inside.rstrip())
    while at < end:
        match = _LABEL.match(inside, at)
        if match is None:
            return None
        value = match[2].decode("utf-8", "replace")
        if "\\" in value:
            value = _ESCAPE.sub(lambda m: _ESCAPED.get(m[1], m[0]), value)
        labels[match[1].decode()] = value
        at = match.end()
    return labels


class Page:
    """Takes a page in pieces of any size and keeps the lines that some dialect wants.

    Work and memory per piece are bounded by the piece, so that a page of many megabytes cannot
    stall whoever shares the event loop with it.
    """

    def __init__(self, dialects: Iterable[Dialect] = DIALECTS) -> None:
        self._dialects = tuple(dialects)
        self._wanted = frozenset().union(*(_WANTED[one.name] for one in self._dialects))
        self._tail = b""
        self._skipping = False  # inside a line longer than LINE_BYTES_MAX
        self.kept: list[bytes] = []
        self.begins = b""  # the first bytes, to say what the page is when it is not one of ours
        self.samples = 0  # lines that are neither blank nor a comment
        self.malformed = 0

    def feed(self, data: bytes) -> None:
        if len(self.begins) < 256:
            self.begins += data[: 256 - len(self.begins)]
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            if not newline:
                return
            self._skipping = False
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        self._keep(lines)
        if len(self._tail) > LINE_BYTES_MAX:
            self.malformed += 1
            self._tail, self._skipping = b"", True

    def _keep(self, lines: list[bytes]) -> None:
        wanted, kept = self._wanted, self.kept
        for line in lines:
            words = line.split(None, 1)
            if not words or line.startswith(b"#"):
                continue
            self.samples += 1
            if words[0].partition(b"{")[0] in wanted and len(kept) < KEPT_LINES_MAX:
                kept.append(line)

    @property
    def cut(self) -> bool:
        """Whether the page ends inside a line, which the format forbids: half a page."""
        return bool(self._tail.strip()) or self._skipping

    def end(self) -> None:
        """Takes a last line without its newline, where the caller knows that the page is whole."""
        last, self._tail = self._tail, b""
        self._keep([last])

    def dialect(self) -> Dialect | None:
        """The dialect with most of its names among the lines kept; None for an unknown server."""

        def score(dialect: Dialect) -> int:
            marks = tuple(mark.encode() for mark in dialect.marks)
            return sum(line.lstrip().startswith(marks) for line in self.kept)

        best = max(self._dialects, key=score, default=None)
        return best if best is not None and score(best) else None

    def read(self) -> list[Sample]:
        """Parses the lines kept; malformed ones are counted and left out, NaN and ±Inf left out."""
        parsed = [read_line(line.rstrip(b"\r")) for line in self.kept]
        self.malformed += parsed.count(None)
        return [one for one in parsed if one is not None and math.isfinite(one.value)]


# --------------------------------------------------------------------------------------- readings


def detect(page: bytes) -> Dialect | None:
    """Which server wrote this page; None for one that no table here describes."""
    return _whole(page, DIALECTS).dialect()


def parse(page: bytes, dialect: Dialect, at_ns: int, model: str | None = None) -> list[Reading]:
    """The canonical readings of a whole page, in the catalogue's units, without labels.

    `at_ns`: time.monotonic_ns() when the answer arrived. `model`: see `readings`.
    """
    return readings(_whole(page, (dialect,)).read(), dialect, at_ns, model)


def models(samples: Iterable[Sample], dialect: Dialect) -> set[str]:
    """The models that a page speaks of."""
    return {one.labels[dialect.model_label] for one in samples if dialect.model_label in one.labels}


def readings(
    samples: list[Sample], dialect: Dialect, at_ns: int, model: str | None = None
) -> list[Reading]:
    """Canonical readings from parsed samples.

    `model` leaves out other models' series where the page speaks of several. A page of one model
    is taken whole: the label holds the first served name, a request may use an alias or an adapter.
    Series without a model label (cache_config_info, the process's start) always count.
    """
    if model is not None and len(models(samples, dialect)) > 1:
        samples = [one for one in samples if one.labels.get(dialect.model_label, model) == model]
    by_name: dict[str, list[Sample]] = {}
    for one in samples:
        by_name.setdefault(one.name, []).append(one)
    values: dict[str, float | None] = {
        canonical: _value(series, by_name) for canonical, series in dialect.series.items()
    }
    for canonical, alternatives in dialect.from_labels.items():
        found = (_from_labels(one, by_name) for one in alternatives)
        values[canonical] = next((value for value in found if value is not None), None)
    return [Reading(at_ns, name, value) for name, value in values.items() if value is not None]


def _value(series: Series, by_name: dict[str, list[Sample]]) -> float | None:
    for name in series.names:
        found = by_name.get(name) or by_name.get(f"{name}_total")
        if found:
            return _AGGREGATES[series.aggregate]([one.value for one in found]) * series.scale
    return None


def _from_labels(source: FromLabels, by_name: dict[str, list[Sample]]) -> float | None:
    products = [
        # vLLM writes Python's "None" before the cache is sized.
        math.prod(_figure(one.labels.get(label, "")) for label in source.labels)
        for one in by_name.get(source.name, ())
    ]
    usable = [product for product in products if math.isfinite(product) and product > 0]
    return _AGGREGATES[source.aggregate](usable) if usable else None


def _figure(text: str) -> float:
    return float(text) if _NUMBER.match(text.encode()) else math.nan


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


_AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "sum": math.fsum,
    "mean": _mean,
    "max": max,
}


def _whole(page: bytes, dialects: Iterable[Dialect]) -> Page:
    taken = Page(dialects)
    taken.feed(page)
    taken.end()
    return taken
