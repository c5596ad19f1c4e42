"""The agent's configuration: one TOML file, checked in whole before anything acts on it.

A section is a frozen struct, a key is one of its fields, and every field has a default. What a key
may hold is said once, by the `Form` in its annotation: how it is read, how it is written back, and
what the error tells to write. Secrets stand in files that the configuration names; they are read
where they are used and are never part of a `Config`, so nothing that prints one can show them.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import msgspec
import platformdirs

from agent.model import Slo, UsageError
from agent.sizing.curve import format_slo, parse_slo
from agent.sizing.rules import Thresholds
from agent.sizing.scene import Needs
from agent.words import printable

if typing.TYPE_CHECKING:
    from agent.sizing.money import Prices as PriceList

T = TypeVar("T")
Named = TypeVar("Named", bound=msgspec.Struct)

FILE_BYTES_MAX = 1024 * 1024
TOKEN_LENGTH_MIN = 16
HOUR_S, DAY_S = 3600.0, 86_400.0
YEAR_S = 366 * DAY_S
RESERVED = ("agent", "assessment", "gpu", "host")  # sources that are no servers
OTLP_ENDPOINT = "http://127.0.0.1:4318"  # where a collector listens for OTLP over HTTP


def default_db() -> Path:
    """`agent.db` in the user's data directory; under systemd that is the unit's StateDirectory."""
    return Path(platformdirs.user_data_dir("servefit")) / "agent.db"


# ------------------------------------------------------------------------------------------- forms


class Form(NamedTuple):
    """What a key may hold.

    `read` takes what TOML gave and the folder that relative paths are relative to; it raises
    ValueError with what is wrong, if more can be said than `write`. `show` is its inverse, as TOML.
    """

    write: str  # completes “write …”
    read: Callable[[Any, Path], Any]
    show: Callable[[Any], Any] = lambda value: value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _demand(condition: object, why: str = "") -> None:
    """Raises ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(why)


_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": HOUR_S, "d": DAY_S}
_UNITS_BYTES = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]+)\s*")


def _amount(value: Any, units: Mapping[str, float]) -> float:
    match = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ValueError
    return round(float(match[1]) * units[match[2]], 6)  # 1.001 s, not 1.0009999999999999


def _in_units(value: float, units: Mapping[str, float]) -> str:
    """The amount in the largest unit in which it is whole, else in the smallest."""
    for unit, size in sorted(units.items(), key=lambda item: -item[1]):
        if value >= size and (value / size).is_integer():
            return f"{int(value / size)}{unit}"
    unit, size = min(units.items(), key=lambda item: item[1])
    return f"{round(value / size, 6):.15g}{unit}"


def duration(at_least_s: float, at_most_s: float = YEAR_S) -> Form:
    """A time with its unit, in seconds."""
    lowest, highest = _in_units(at_least_s, _UNITS_S), _in_units(at_most_s, _UNITS_S)

    def read(value: Any, _: Path) -> float:
        seconds = _amount(value, _UNITS_S)
        _demand(at_least_s <= seconds <= at_most_s, f"it may be {lowest} to {highest}")
        return seconds

    return Form(f'a time with its unit, such as "{lowest}"', read, lambda s: _in_units(s, _UNITS_S))


def size(at_least_bytes: int) -> Form:
    """An amount of bytes with its unit."""
    lowest = _in_units(at_least_bytes, _UNITS_BYTES)

    def read(value: Any, _: Path) -> int:
        given = int(_amount(value, _UNITS_BYTES))
        _demand(given >= at_least_bytes, f"it may not be under {lowest}")
        return given

    return Form('a size with its unit, such as "1GiB"', read, lambda n: _in_units(n, _UNITS_BYTES))


def one_of(*words: str) -> Form:
    listed = ", ".join(f'"{word}"' for word in words)

    def read(value: Any, _: Path) -> Any:
        _demand(isinstance(value, str) and value in words, _nearest(value, words))
        return value

    return Form(f"one of {listed}", read)


def _nearest(word: object, words: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), list(words), n=1)
    return f'did you mean "{near[0]}"?' if near else ""


def _read_flag(value: Any, _: Path) -> bool:
    _demand(isinstance(value, bool))
    return bool(value)


def _read_positive(value: Any, _: Path) -> float:
    _demand(_is_number(value) and 0 < value <= 1e9)
    return float(value)


def _read_name(value: Any, _: Path) -> Any:
    _demand(isinstance(value, str) and re.fullmatch(r"[\w\[][\w.:/\[\]-]{0,99}", value))
    return value


def _read_path(value: Any, folder: Path) -> Path:
    _demand(isinstance(value, str) and value.strip() and "\0" not in value)
    try:
        return folder / Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError("there is no such home directory") from error


def _read_url(value: Any, _: Path) -> Any:
    """An http address. Credentials in it would be shown wherever the address is."""
    _demand(isinstance(value, str) and value.isprintable() and " " not in value)
    try:
        parts = urlsplit(value)
        _demand(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        raise ValueError from None
    _demand("@" not in parts.netloc, "a user or password in it would be shown: use headers_file")
    return urlunsplit(parts._replace(fragment="")).rstrip("/")


def _read_endpoint(value: Any, folder: Path) -> Any:
    url = _read_url(value, folder)
    _demand(not urlsplit(url).query, "it takes no query; what is secret belongs in headers_file")
    return url


def _read_base_url(value: Any, folder: Path) -> Any:
    return _read_endpoint(value, folder).removesuffix("/v1")


def server_url(url: str, option: str) -> str:
    """The base URL of a server as a flag gives it. Raises UsageError with what to write."""
    return cast(str, _given(BASE_URL, url, option))


def _given(form: Form, value: str, by: str) -> Any:
    try:
        return form.read(value, Path())
    except ValueError as error:
        more = f" ({error})" if str(error) else ""
        raise UsageError(f"{by}: write {form.write}{more}") from None


def shown_url(url: str) -> str:
    """The address with its query hidden, which may hold a key."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="hidden")) if parts.query else url


def _read_listen(value: Any, _: Path) -> Any:
    _demand(isinstance(value, str))
    host, port = host_port(value)
    _demand(re.fullmatch(r"[A-Za-z0-9.:%_-]+", host) and 0 <= port <= 65535)
    return value


def host_port(listen: str) -> tuple[str, int]:
    """`127.0.0.1:9477` or `[::1]:9477` in its two parts. Raises ValueError for anything else."""
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):(\d{1,5})", listen)
    if match is None:
        raise ValueError
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to it. Of names, `localhost` alone is sure to be."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_slo(value: Any, _: Path) -> tuple[Slo, ...]:
    _demand(isinstance(value, str))
    try:
        return tuple(parse_slo(value))
    except UsageError as error:
        raise ValueError(str(error)) from error


def _read_gpus(value: Any, _: Path) -> tuple[str | int, ...]:
    _demand(isinstance(value, list) and value)
    for one in value:
        is_index = isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1024
        _demand(is_index or (isinstance(one, str) and re.fullmatch(r"(GPU|MIG)-[\w/-]+", one)))
    _demand(len(set(value)) == len(value), "one of them stands there twice")
    return tuple(value)


FLAG = Form("true or false", _read_flag)
POSITIVE = Form("a number above 0", _read_positive)
NAME = Form('a short name of letters, digits and . _ - such as "chat"', _read_name)
FILE = Form("the path of a file, in quotes", _read_path, str)
URL = Form('an address such as "http://127.0.0.1:8000/metrics"', _read_url, shown_url)
ENDPOINT = Form('an address such as "http://127.0.0.1:4318"', _read_endpoint)
BASE_URL = Form('an address such as "http://127.0.0.1:8000"', _read_base_url)
LISTEN = Form('an address and a port, such as "127.0.0.1:9477"', _read_listen)
SLO = Form('targets such as "ttft:p95<500ms,itl:p95<50ms"', _read_slo, format_slo)
GPUS = Form('a list of indices or UUIDs, such as [0, 1] or ["GPU-5c8e…"]', _read_gpus, list)

# ---------------------------------------------------------------------------------------- sections


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon itself."""

    db: Annotated[Path, FILE] = msgspec.field(default_factory=default_db)
    listen: Annotated[str, LISTEN] = "127.0.0.1:9477"
    token_file: Annotated[Path | None, FILE] = None
    allow_no_token: Annotated[bool, FLAG] = False  # to listen beyond the loopback without one


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """How long is kept what; hours are kept for ever."""

    raw_s: Annotated[float, duration(HOUR_S, 100 * YEAR_S)] = msgspec.field(
        default=7 * DAY_S, name="raw"
    )
    minutes_s: Annotated[float, duration(DAY_S, 100 * YEAR_S)] = msgspec.field(
        default=90 * DAY_S, name="minutes"
    )
    free_bytes_min: Annotated[int, size(16 * 2**20)] = msgspec.field(
        default=512 * 2**20, name="free_floor"
    )


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """Where the GPUs' readings come from. The driver is asked no more than once a second."""

    source: Annotated[str, one_of("auto", "nvml", "dcgm", "amdsmi", "none")] = "auto"
    interval_s: Annotated[float, duration(1, HOUR_S)] = msgspec.field(default=1.0, name="interval")
    url: Annotated[str | None, URL] = None  # of dcgm-exporter's page
    gpm: Annotated[bool, FLAG] = False  # occupancy, tensor and DRAM activity: Hopper and newer


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """One inference server. Its name, unless one is given, is the host and port of its URL."""

    name: Annotated[str, NAME] = ""
    url: Annotated[str, BASE_URL] = "http://127.0.0.1:8000"
    metrics_url: Annotated[str, URL] = ""
    interval_s: Annotated[float, duration(1, HOUR_S)] = msgspec.field(default=5.0, name="interval")
    service: Annotated[str | None, NAME] = None  # servers of one service are its replicas
    gpus: Annotated[tuple[str | int, ...], GPUS] = ()  # none: by the process list
    slo: Annotated[tuple[Slo, ...], SLO] = ()  # none: [slo] targets
    headers_file: Annotated[Path | None, FILE] = None
    ca_file: Annotated[Path | None, FILE] = None

    def __post_init__(self) -> None:
        set_once = msgspec.structs.force_setattr
        if not self.name:
            set_once(self, "name", urlsplit(self.url).netloc)
        if not self.metrics_url:
            set_once(self, "metrics_url", f"{self.url}/metrics")


class Targets(msgspec.Struct, frozen=True, kw_only=True):
    """What every server is judged against that has no `slo` of its own."""

    targets: Annotated[tuple[Slo, ...], SLO] = ()


class _Over(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of the verdict's rules that were set otherwise; null is as usual."""

    def over(self, usual: Named) -> Named:
        """`usual` with what is set here."""
        names = [one.name for one in msgspec.structs.fields(type(usual))]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(usual, **given)


def _read_whole(value: Any, _: Path) -> int:
    _demand(isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 10**9)
    return int(value)


WHOLE = Form("a whole number above 0", _read_whole)


def _rule(name: str, usual: object) -> tuple[str, Any, Any]:
    """A key for a number of the rules: a time where its name ends with `_s`."""
    is_time = name.endswith("_s")
    form = duration(1) if is_time else WHOLE if isinstance(usual, int) else POSITIVE
    key = msgspec.field(default=None, name=name.removesuffix("_s"))
    kind = int if form is WHOLE else float
    return name, Annotated[kind | None, form], key


if typing.TYPE_CHECKING:
    Rules = _Over
else:
    # One table: each number of `Needs` and `Thresholds` by its own name, where it is explained.
    Rules = msgspec.defstruct(
        "Rules",
        [
            _rule(field.name, field.default)
            for kind in (Needs, Thresholds)
            for field in msgspec.structs.fields(kind)
        ],
        bases=(_Over,),
        frozen=True,
        kw_only=True,
    )


class Assess(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduled verdict."""

    every_s: Annotated[float, duration(60, 31 * DAY_S)] = msgspec.field(
        default=HOUR_S, name="every"
    )
    window_s: Annotated[float, duration(HOUR_S, YEAR_S)] = msgspec.field(
        default=7 * DAY_S, name="window"
    )
    trains: Annotated[bool, FLAG] = False  # whether the GPUs also train when nobody asks
    expect_concurrency: Annotated[float | None, POSITIVE] = None
    rules: Rules = Rules()


class OtlpExport(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics and assessments to an OpenTelemetry back end."""

    endpoint: Annotated[str, ENDPOINT] = OTLP_ENDPOINT
    headers_file: Annotated[Path | None, FILE] = None
    ca_file: Annotated[Path | None, FILE] = None


class OtlpReceive(msgspec.Struct, frozen=True, kw_only=True):
    """Spans of the inference server, taken on the loopback only."""

    listen: Annotated[str, LISTEN] = "127.0.0.1:4319"


class Export(msgspec.Struct, frozen=True, kw_only=True):
    otlp: OtlpExport | None = None


class Receive(msgspec.Struct, frozen=True, kw_only=True):
    otlp: OtlpReceive | None = None


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    file: Annotated[Path | None, FILE] = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything; `Config()` is what an empty file says."""

    agent: Agent = msgspec.field(default_factory=Agent)
    store: Store = Store()
    gpu: Gpu = Gpu()
    server: tuple[Server, ...] = ()
    slo: Targets = Targets()
    assess: Assess = Assess()
    export: Export = Export()
    receive: Receive = Receive()
    prices: Prices = Prices()


class Field(NamedTuple):
    """One key or section as a struct declares it: `form` for a key, else `table` for a section."""

    name: str  # in the struct
    key: str  # in the file
    form: Form | None
    table: type[msgspec.Struct] | None
    is_list: bool
    default: Any


def fields(kind: type[msgspec.Struct]) -> Iterator[Field]:
    """What a section holds, in the order of the file."""
    hints = typing.get_type_hints(kind, include_extras=True)
    empty = kind()
    for one in msgspec.structs.fields(kind):
        hint = hints[one.name]
        form = next(iter(getattr(hint, "__metadata__", ())), None)
        inner = [hint, *typing.get_args(hint)] if form is None else []
        tables = [t for t in inner if isinstance(t, type) and not isinstance(t, types.GenericAlias)]
        table = next((t for t in tables if issubclass(t, msgspec.Struct)), None)
        is_list = typing.get_origin(hint) is tuple
        default = getattr(empty, one.name)
        yield Field(one.name, one.encode_name, form, table, is_list, default)


# ----------------------------------------------------------------------------------------- reading


class _Source(NamedTuple):
    """The file that is read: for its errors, and for its relative paths."""

    file: str
    text: str
    folder: Path

    def error(self, why: str, section: str = "", nth: int = 0, key: str = "") -> UsageError:
        line = line_of(self.text, section, nth, key)
        place = f"{self.file}:{line}" if line else self.file
        named = " ".join(part for part in (f"[{section}]" if section else "", key) if part)
        return UsageError(f"{place}: {named}: {why}" if named else f"{place}: {why}")


_HEADER = re.compile(r"\s*\[{1,2}\s*([A-Za-z0-9_.\- ]+?)\s*\]{1,2}\s*(?:#.*)?$")


def line_of(text: str, section: str, nth: int = 0, key: str = "") -> int | None:
    """The line of a key in the `nth` section of a name, or of the section; None if not seen.

    tomllib tells no places. A key inside an inline table or a dotted one is not looked for.
    """
    current, seen, fallback = "", -1 if section else 0, None
    for number, line in enumerate(text.splitlines(), 1):
        if match := _HEADER.match(line):
            current = match[1]
            seen += current == section
            if current == section and seen == nth:
                fallback = number
        elif current == section and seen == nth and key and _names(line, key):
            return number
    return fallback


def _names(line: str, key: str) -> bool:
    return re.match(rf"\s*([\"']?){re.escape(key)}\1\s*[=.]", line) is not None


def load(path: str | Path, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration of a file, with every file that it names looked into.

    Raises UsageError: one line with the file, the place in it and what to write.
    """
    file = Path(path)
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
        text = data.decode()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not a text in UTF-8: byte {error.start}") from error
    if len(data) > FILE_BYTES_MAX:
        raise UsageError(f"{path}: has more than {FILE_BYTES_MAX} bytes: is it the right file?")
    config = parse(text, str(path), file.absolute().parent, environ)
    check_files(config, str(path))
    return config


def parse(
    text: str,
    file: str = "the configuration",
    folder: Path = Path(),
    environ: Mapping[str, str] = {},
) -> Config:
    """The configuration that `text` says; reads no file. `folder`: what paths are relative to.

    An `[export.otlp]` without an endpoint takes OpenTelemetry's own variable,
    OTEL_EXPORTER_OTLP_ENDPOINT; OTEL_SDK_DISABLED=true takes the section away.
    """
    source = _Source(file, text, folder)
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise UsageError(f"{file}: is not TOML: {error}") from error
    _from_environment(raw, environ)
    config = _table(Config, raw, source)
    _check(config, source)
    return config


_ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"


def _from_environment(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    export = raw.get("export")
    if not isinstance(export, dict) or not isinstance(export.get("otlp"), dict):
        return
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        del export["otlp"]
    elif endpoint := environ.get(_ENDPOINT_VARIABLE, "").strip():
        export["otlp"].setdefault("endpoint", _given(ENDPOINT, endpoint, _ENDPOINT_VARIABLE))


def _table(kind: type[T], raw: object, source: _Source, section: str = "", nth: int = 0) -> T:
    if not isinstance(raw, dict):
        raise source.error(f"write it as a section, [{section}]", key=section)
    known = {field.key: field for field in fields(cast(type[msgspec.Struct], kind))}
    values = {}
    for key, value in raw.items():
        if key not in known:
            _unknown(source, section, nth, key, value, known)
        field = known[key]
        values[field.name] = (
            _sections(field, value, source, section)
            if field.form is None
            else _value(field.form, key, value, source, section, nth)
        )
    return kind(**values)


def _sections(field: Field, raw: object, source: _Source, within: str) -> Any:
    assert field.table is not None
    section = f"{within}.{field.key}" if within else field.key
    if not field.is_list:
        return _table(field.table, raw, source, section)
    if not isinstance(raw, list):
        raise source.error(f"write two brackets, [[{section}]]: there may be several", section)
    return tuple(_table(field.table, one, source, section, n) for n, one in enumerate(raw))


def _value(form: Form, key: str, value: object, source: _Source, section: str, nth: int) -> Any:
    try:
        return form.read(value, source.folder)
    except ValueError as error:
        more = f" ({error})" if str(error) else ""
        raise source.error(f"write {form.write}{more}", section, nth, key) from None


def _unknown(
    source: _Source, section: str, nth: int, key: str, value: object, known: Mapping[str, Field]
) -> NoReturn:
    kind = "key" if all(field.form for field in known.values()) else "section"
    home = next((name for name, keys in _KEYS.items() if key in keys), None)
    if not (section or isinstance(value, dict | list)) and home:
        why = f"unknown at the top: it belongs under [{home}]"
    else:
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.0)
        listed = ", ".join(known)
        why = f'unknown {kind}, did you mean "{near[0]}"? (known: {listed})'
    # A section that is not known has a header of its own, a key stands under its section's.
    line = line_of(source.text, section, nth, key)
    inner = f"{section}.{key}" if section else key
    header = line_of(source.text, inner)
    place = f"{source.file}:{header or line}" if header or line else source.file
    raise UsageError(f"{place}: {f'[{section}] ' if section else ''}{printable(key[:60])}: {why}")


_KEYS = {
    name: {field.key for field in fields(kind)}
    for name, kind in (
        ("agent", Agent), ("store", Store), ("gpu", Gpu), ("[server]", Server), ("slo", Targets),
        ("assess", Assess), ("export.otlp", OtlpExport), ("prices", Prices),
    )
}  # fmt: skip

# ---------------------------------------------------------------------------------- contradictions


def _check(config: Config, source: _Source) -> None:
    """What each key may say alone, and the file as a whole may not."""
    agent, gpu = config.agent, config.gpu
    host, port = host_port(agent.listen)
    if not (is_loopback(host) or agent.token_file or agent.allow_no_token):
        raise source.error(
            f"{agent.listen} can be reached from other machines: give token_file (or "
            "allow_no_token = true, where nobody else can reach it)",
            "agent", key="listen",
        )  # fmt: skip
    if gpu.source == "dcgm" and gpu.url is None:
        raise source.error(
            'source = "dcgm" needs url, such as "http://gpu-host:9400/metrics"', "gpu", key="source"
        )
    if gpu.source != "dcgm" and gpu.url is not None:
        raise source.error(
            f'url is used with source = "dcgm", not "{gpu.source}"', "gpu", key="url"
        )
    _check_servers(config, source)
    _check_otlp(config, source, port)


def _check_servers(config: Config, source: _Source) -> None:
    names: dict[str, int] = {}
    pages: dict[str, str] = {}
    gpus: dict[str | int, str] = {}
    for nth, server in enumerate(config.server):
        if server.name in names:
            raise source.error(
                f'two servers are called "{server.name}": give each a name of its own',
                "server", nth, "name",
            )  # fmt: skip
        if server.name in RESERVED or server.name.startswith("service:"):
            raise source.error(
                f'"{server.name}" is what the agent calls something else: give it another name',
                "server", nth, "name",
            )  # fmt: skip
        names[server.name] = nth
        if (other := pages.setdefault(server.metrics_url, server.name)) != server.name:
            raise source.error(
                f'"{other}" and "{server.name}" read the same page, which would count twice: '
                "leave one of them out",
                "server", nth, "metrics_url",
            )  # fmt: skip
        for gpu in server.gpus:
            if (other := gpus.setdefault(gpu, server.name)) != server.name:
                raise source.error(
                    f'GPU {gpu} is given to "{other}" and to "{server.name}": give it to one, or '
                    "to neither, and the process list decides",
                    "server", nth, "gpus",
                )  # fmt: skip
        if server.gpus and config.gpu.source == "none":
            raise source.error(
                'gpus are listed, and [gpu] source = "none" reads none', "server", nth, "gpus"
            )


def _check_otlp(config: Config, source: _Source, port: int) -> None:
    receive, export = config.receive.otlp, config.export.otlp
    if receive is None:
        return
    host, own = host_port(receive.listen)
    if not is_loopback(host):
        raise source.error(
            f'{receive.listen} is not the loopback: it takes spans from this machine only, write '
            f'"127.0.0.1:{own}"',
            "receive.otlp", key="listen",
        )  # fmt: skip
    if own == port and port:
        raise source.error(
            f"port {own} is [agent] listen too: give each its own", "receive.otlp", key="listen"
        )
    if export is not None:
        parts = urlsplit(export.endpoint)
        if parts.port == own and is_loopback(parts.hostname or ""):
            raise source.error(
                f"{export.endpoint} is where [receive.otlp] listens: what is sent would come back",
                "export.otlp", key="endpoint",
            )  # fmt: skip


# ----------------------------------------------------------------------------------------- secrets


def check_files(config: Config, file: str) -> None:
    """Reads every file that the configuration names, so that a start does not fail on one later."""
    try:
        if config.agent.token_file:
            read_token(config.agent.token_file)
        otlp = (config.export.otlp,) if config.export.otlp else ()
        for section in (*config.server, *otlp):
            if section.headers_file:
                read_headers(section.headers_file)
            if section.ca_file:
                _check_ca(section.ca_file)
        if config.prices.file:
            read_prices(config.prices.file)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def read_prices(path: Path) -> PriceList:
    """The prices that a file declares. Raises UsageError naming the file."""
    from agent.sizing.money import parse_prices

    try:
        return parse_prices(_read(path, "prices file"))
    except UsageError as error:
        if str(path) in str(error):
            raise
        raise UsageError(f"prices file {path}: {error}") from error


def read_token(path: Path) -> str:
    """The token that a token file holds. UsageError says what is wrong, never what it holds."""
    token = _read(path, "token_file").strip()
    if len(token) < TOKEN_LENGTH_MIN or not re.fullmatch(r"[!-~]+", token):
        raise UsageError(
            f"token_file {path}: holds no token of at least {TOKEN_LENGTH_MIN} characters without "
            f"blanks: write one by `openssl rand -hex 32 > {path}`"
        )
    return token


_HEADER_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*:\s*([\x20-\x7e]*)")


def read_headers(path: Path) -> dict[str, str]:
    """The headers of a file of `Name: value` lines; blank lines and `#` comments are read over."""
    headers = {}
    for number, line in enumerate(_read(path, "headers_file").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _HEADER_LINE.fullmatch(line.strip())
        if match is None:
            raise UsageError(
                f"headers_file {path}:{number}: write a header a line, such as 'Authorization: "
                "Bearer …'"
            )
        headers[match[1]] = match[2]
    return headers


def otlp_headers(export: OtlpExport, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What goes out with every batch: OTEL_EXPORTER_OTLP_HEADERS, and over it the headers file."""
    from opentelemetry.util.re import parse_env_headers

    said = environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")
    headers: dict[str, str] = dict(parse_env_headers(said, liberal=True))
    if export.headers_file:
        headers |= {k.lower(): v for k, v in read_headers(export.headers_file).items()}
    return headers


def _read(path: Path, what: str) -> str:
    try:
        with path.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
        _demand(len(data) <= FILE_BYTES_MAX)
        return data.decode()
    except OSError as error:
        raise UsageError(f"{what} {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{what} {path}: is no small text file in UTF-8") from error


def _check_ca(path: Path) -> None:
    import ssl

    try:
        ssl.create_default_context(cafile=str(path))
    except ssl.SSLError as error:
        raise UsageError(f"ca_file {path}: holds no certificate in PEM form") from error
    except OSError as error:
        raise UsageError(f"ca_file {path}: cannot be read: {error.strerror}") from error


# ----------------------------------------------------------------------------------------- writing


def render(config: Config) -> str:
    """The configuration as TOML that says the same again; what was not given is left out."""
    return "\n".join(_lines(config)).rstrip() + "\n"


def _lines(table: msgspec.Struct, section: str = "") -> Iterator[str]:
    for field in fields(type(table)):
        value = getattr(table, field.name)
        if field.form is not None:
            if value not in (None, ()):
                yield f"{field.key} = {_toml(field.form.show(value))}"
            continue
        name = f"{section}.{field.key}" if section else field.key
        for one in value if field.is_list else (value,):
            if one is None:
                continue
            inner = list(_lines(one, name))
            if inner and not inner[0].startswith("["):
                yield f"[[{name}]]" if field.is_list else f"[{name}]"
            yield from inner
            if inner and inner[-1]:
                yield ""  # between sections


def _toml(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(_toml(one) for one in value)}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)
