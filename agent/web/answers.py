"""What the addresses of /api/v1 answer, worked out of the store.

Each function runs in a thread, over a `Recall` of its own; what only the running agent knows is
handed in with `Now`. Raises UsageError for a question that makes no sense, NotKnown for what there
is none of, StoreError where the store does not answer.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from agent.fitting import fitting, model_of
from agent.forms import advice
from agent.live import ServerStatus
from agent.minutes import Minute
from agent.model import Sweep, UsageError, Verdict, encode
from agent.question import Series, Table
from agent.recall import Recall
from agent.sizing.passive import Passive, passive_curve
from agent.sizing.pattern import Pattern, pattern
from agent.sizing.window import COUNTERS, GAUGES, GPU, HISTOGRAMS, Window
from agent.when import parse_instant_s, parse_span_s

# Minutes by the ten thousand are read and reckoned for seconds, beside a server in production.
WINDOW_MAX_S = 35 * 86_400.0
METRICS_MAX = 32
READINGS_SPAN_MAX_S = 3600.0
READINGS_MAX = 500_000  # 40 MB of JSON
_PIECE = 5_000
_SERVER_SERIES = GAUGES | COUNTERS | frozenset(HISTOGRAMS)

By = Literal["source", "url", "model"]


class NotKnown(UsageError):
    """There is no such thing."""


class Measured(msgspec.Struct, frozen=True):
    """A stored curve. `by`: why it is taken for the server's."""

    id: int
    started_at: str
    received_unix_s: float
    by: By
    sweep: Sweep


class Curves(msgspec.Struct, frozen=True):
    """`/api/v1/curve`: the newest that was measured, and what production showed by itself."""

    measured: Measured | None
    passive: Passive


class Now(NamedTuple):
    """What the running agent alone knows, at one moment. Of samples only windows ask."""

    unix_s: float
    servers: Sequence[ServerStatus]
    intervals_s: Mapping[str, float] = {}  # how often each server is sampled
    newest_unix_s: Mapping[str, float] = {}  # when each source was sampled last
    open_minutes: Sequence[Minute] = ()


class Asked(NamedTuple):
    """Whom a question is about: a server, the servers of a service, or all that are configured."""

    server: str | None = None
    service: str | None = None


# ------------------------------------------------------------------------------------------- whose


class Whose(NamedTuple):
    """Servers, and the UUIDs of their GPUs.

    `gpus`: None for every GPU, because nobody in particular was asked for; empty where it is not
    known which they are.
    """

    servers: tuple[ServerStatus, ...]
    gpus: frozenset[str] | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.servers)


def whose(recall: Recall, now: Now, asked: Asked) -> Whose:
    """The servers of a question. The store also has those that were configured once.

    Raises NotKnown.
    """
    if asked == Asked():
        return Whose(tuple(now.servers), None)
    known = {
        one["name"]: ServerStatus(one["name"], "", one["service"], gpus=tuple(one["gpus"]))
        for one in recall.sources()
    } | {one.name: one for one in now.servers}
    chosen = tuple(
        one
        for one in known.values()
        if asked.server in (None, one.name) and asked.service in (None, one.service)
    )
    if not chosen:
        raise NotKnown(_unknown(asked, known.values()))
    gpus = (uuid for one in chosen for uuid in one.gpus)
    return Whose(chosen, frozenset(gpus if all(one.gpus for one in chosen) else ()))


def _unknown(asked: Asked, known: Collection[ServerStatus]) -> str:
    kind = "server" if asked.server is not None else "service"
    name = asked.server if asked.server is not None else asked.service
    names = {one.name if kind == "server" else one.service for one in known} - {None}
    near = difflib.get_close_matches(str(name), sorted(map(str, names)), n=1, cutoff=0.0)
    return f"no {kind} {name!r}" + (f", nearest is {near[0]!r}" if near else "")


# ----------------------------------------------------------------------------- pattern and curves


class Seen(NamedTuple):
    """What was observed of servers in a window: pattern and curve are worked out of it alone."""

    whose: Whose
    window: Window
    open_minutes: Sequence[Minute]  # those that it holds


def seen(recall: Recall, now: Now, asked: Asked, window_s: float) -> Seen:
    """The minutes of the servers, and of their GPUs where it is known which."""
    about = whose(recall, now, asked)
    window = _window(recall, now, about, window_s)
    for source in recall.speakers("gpu_energy_j", "gpu_power_w"):
        records = recall.records(source, window.origin_unix_s, window.end_unix_s, GPU, about.gpus)
        window.add_records(records)
    of_gpus = (one for one in now.open_minutes if one.source not in about.names)
    window.add_all(_until(one, window.end_unix_s) for one in of_gpus)
    return Seen(about, window, now.open_minutes)


def observed_pattern(_: Recall, observed: Seen) -> Pattern:
    """What was asked of the servers, and what energy that took."""
    return pattern(observed.window)


def curves(recall: Recall, observed: Seen) -> Curves:
    """What was measured for the servers, and what production showed of them in the window."""
    return Curves(measured(recall, observed.whose.servers), passive_curve(observed.window))


def _window(recall: Recall, now: Now, about: Whose, window_s: float) -> Window:
    """The servers' minutes: those of the store, and the open ones, which it does not have yet."""
    end_s = _end_s(now, about.names)
    window = Window(max(0.0, end_s - window_s), end_s, servers=about.names, gpus=about.gpus)
    for name in about.names:
        window.add_records(recall.records(name, window.origin_unix_s, end_s, _SERVER_SERIES))
    return window.add_all(one for one in now.open_minutes if one.source in about.names)


def _end_s(now: Now, names: Sequence[str]) -> float:
    """A window ends at the newest sample, and never further back than two intervals."""
    interval_s = max((now.intervals_s.get(name, 0.0) for name in names), default=0.0)
    samples = [now.newest_unix_s[name] for name in names if name in now.newest_unix_s]
    return max([now.unix_s - 2 * interval_s, *samples])


def _until(minute: Minute, end_s: float) -> Minute:
    """An open minute up to an instant: GPUs are looked at oftener than servers, and go further."""
    seconds = max(0.0, end_s - minute.start_unix_s)
    if minute.covered_s <= seconds:
        return minute
    share = seconds / minute.covered_s
    values = tuple(
        one if one.increase is None else msgspec.structs.replace(one, increase=one.increase * share)
        for one in minute.values
    )
    return msgspec.structs.replace(minute, values=values, covered_s=seconds)


def measured(recall: Recall, servers: Sequence[ServerStatus]) -> Measured | None:
    """The stored curve that a verdict on these servers would be made by; see `agent.fitting`."""
    models = {one.name: model_of(recall.fingerprints(one.name)) or one.model for one in servers}
    urls = {one.name: one.url for one in servers}
    gpus = {gpu for one in servers for gpu in one.gpus}
    found = fitting(recall, models, urls, gpus, notes=[])
    if found is None:
        return None
    by: By = "source" if found.by == "server" else found.by
    row = found.row
    return Measured(row["id"], row["started_at"], row["received_unix_s"], by, found.sweep)


# ---------------------------------------------------------------------------------------- the rest


def series(
    recall: Recall,
    now: Now,
    asked: Asked,
    metric: str,
    *,
    begin: str | None = None,
    end: str | None = None,
    step: str | None = None,
    gpu: str | None = None,
) -> Series:
    """As `agent query`: the last hour up to the newest sample, unless it says otherwise."""
    steps = _steps(recall, now, begin, end, step)
    return recall.series(metric, *steps, server=asked.server, service=asked.service, gpu=gpu)


def table(
    recall: Recall,
    now: Now,
    asked: Asked,
    metrics: str,
    *,
    begin: str | None = None,
    end: str | None = None,
    step: str | None = None,
    gpu: str | None = None,
) -> Table:
    """Several series over the same steps; `metrics` is their names with commas between."""
    names = metrics.split(",")
    if len(names) > METRICS_MAX:
        raise UsageError(f"{len(names)} metrics: ask for at most {METRICS_MAX} at once")
    steps = _steps(recall, now, begin, end, step)
    return recall.table(names, *steps, server=asked.server, service=asked.service, gpu=gpu)


def _steps(
    recall: Recall, now: Now, begin: str | None, end: str | None, step: str | None
) -> tuple[float, float, float | None]:
    """From, to and step in seconds. Raises UsageError."""
    to_s = parse_instant_s(end, "to") if end else recall.newest_unix_s(now.unix_s) or now.unix_s
    from_s = parse_instant_s(begin, "from") if begin else max(0.0, to_s - 3600.0)
    return from_s, to_s, parse_span_s(step, "step") if step else None


def assessments(
    recall: Recall, now: Now, asked: Asked, limit: int, changes: bool
) -> list[dict[str, Any]]:
    """What was concluded, newest first; of a service the store files it as `service:NAME`.

    `changes`: those in a row that say the same are one, with `since_unix_s` and how many. Each has
    its `advice` in sentences, so that no page makes them of the numbers anew.
    """
    whose(recall, now, asked)
    scope = asked.server if asked.service is None else f"service:{asked.service}"
    found = recall.findings(scope, limit) if changes else recall.assessments(scope, limit)
    return [{**one, "advice": advice(_verdict(one["verdict"]))} for one in found]


def _verdict(kept: Any) -> Verdict:
    if isinstance(kept, msgspec.Raw):  # a long history, which is passed on as it lies there
        return msgspec.json.decode(kept, type=Verdict)
    return msgspec.convert(kept, Verdict)


def readings(recall: Recall, now: Now, asked: Asked, begin: str, end: str) -> bytearray:
    """JSON of the raw readings of one server and of its GPUs; of every GPU where not known.

    It is written piece by piece: as Python's objects half a million readings are 200 MB.
    """
    from_s, to_s = parse_instant_s(begin, "from"), parse_instant_s(end, "to")
    if not 0 <= to_s - from_s <= READINGS_SPAN_MAX_S:
        raise UsageError(
            f"readings from {from_s:.0f} to {to_s:.0f}: ask for at most an hour at once"
        )
    about = whose(recall, now, asked)
    (name,) = about.names
    rows = recall.readings(name, from_s, to_s, gpus=about.gpus or None)
    head = b'{"server":%b,"now_unix_s":%b,"readings":[' % (encode(name), encode(now.unix_s))
    body = bytearray(head)
    for number in itertools.count():
        piece = list(itertools.islice(rows, _PIECE))
        if not piece:
            break
        if number * _PIECE >= READINGS_MAX:
            raise UsageError(f"more than {READINGS_MAX:,} readings: ask for less time at once")
        body += b"," * bool(number) + encode(piece)[1:-1]
    body += b"]}"
    return body


def window_s(text: str | None, default: str) -> float:
    """How long a window is asked for. Raises UsageError."""
    seconds = parse_span_s(text or default, "window")
    if seconds > WINDOW_MAX_S:
        raise UsageError(f"window {text!r}: write at most {WINDOW_MAX_S / 86_400:.0f}d")
    return seconds
