"""loadgen from Python, for scripts and notebooks: the commands as functions, with typed results.

What a function takes and does is what the command of its name does: options are the command's
flags as keywords, parsed by the command line's own code. The measurement runs on a thread with an
event loop of its own, so that it can be called where a loop is running already (a notebook), and
the caller's loop is not measured together with the server.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from agent.model import Slo, StoreError, Sweep, UsageError

if TYPE_CHECKING:
    from agent.model import Level
    from agent.store import Store
    from loadgen.config import Options
    from loadgen.moment import Moment
    from loadgen.schedule import Upcoming
    from loadgen.session import Session, Watcher

# Flags that say how the command line talks and ends; a function returns what was measured.
ONLY_COMMANDS = ("quiet", "no_progress", "fail_on", "resume")
FILES = ("json", "html", "csv")

log = logging.getLogger("loadgen")


def sweep(
    url: str | None = None,
    *,
    db: str | Path | bool | None = None,
    progress: bool = False,
    **options: Any,
) -> Sweep:
    """Measures throughput and latency against concurrency (or request rate), as `loadgen sweep`.

    `options` are the command's flags (`loadgen sweep --help`) with `_` for `-`: numbers, lists,
    times as seconds or as `'30s'`, headers as a dict. Those left out come from `LOADGEN_*` in the
    environment or `config=FILE`, else they have the command's defaults. Without a URL the server
    on this machine is found.

    The run is kept in the database in your data directory; `db` names another one, and `False`
    keeps it nowhere. Nothing is printed unless `progress`; the log `loadgen` tells the same.

    Raises TypeError for an unknown option, UsageError for one that cannot be, TargetError where
    the server cannot be used, StoreError for a `db` that cannot. What fails within a level is data
    of that level. Ctrl-C ends it and raises KeyboardInterrupt; what was measured is kept in the
    database, for `load`.
    """
    return _wait(_Measurement("sweep", url, db, progress, options))


def run(
    url: str | None = None,
    *,
    db: str | Path | bool | None = None,
    progress: bool = False,
    **options: Any,
) -> Sweep:
    """Measures one load point, as `loadgen run`; otherwise as `sweep`."""
    return _wait(_Measurement("run", url, db, progress, options))


async def sweep_async(
    url: str | None = None,
    *,
    db: str | Path | bool | None = None,
    progress: bool = False,
    **options: Any,
) -> Sweep:
    """`sweep` to be awaited. Cancelled, it ends its level, keeps it and is cancelled."""
    return await _awaited(_Measurement("sweep", url, db, progress, options))


async def run_async(
    url: str | None = None,
    *,
    db: str | Path | bool | None = None,
    progress: bool = False,
    **options: Any,
) -> Sweep:
    """`run` to be awaited; see `sweep_async`."""
    return await _awaited(_Measurement("run", url, db, progress, options))


def load(run: str = "latest", *, db: str | Path | None = None) -> Sweep:
    """A run from the database: its id, the beginning of one, or `latest`.

    Raises UsageError where there is no such run, StoreError for a database that cannot be read.
    """
    from agent.store import Store

    with Store(Path(db) if db else None) as store:
        return store.load(run)


# ------------------------------------------------------------------------------------ measuring


class _Measurement:
    """One run on a thread of its own. `result` is what it measured, or what stopped it."""

    def __init__(
        self,
        command: str,
        url: str | None,
        db: str | Path | bool | None,
        progress: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.result: Future[Sweep] = Future()
        self.result.set_running_or_notify_cancel()
        self._asked = (command, url, db, options)
        self._progress = progress
        self._session: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._work, name="loadgen", daemon=True).start()

    def stop(self) -> None:
        """Ends it soon; a level that is running is kept as far as it came. From any thread."""
        self._stopped.set()
        if self._loop is not None and self._session is not None:
            with suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._session.interrupt)

    def _work(self) -> None:
        try:
            self.result.set_result(self._measure())
        except BaseException as error:
            self.result.set_exception(error)

    def _measure(self) -> Sweep:
        import uvloop

        from loadgen import cli

        command, url, db, asked = self._asked
        watcher = self._watcher()
        options, given = _parsed(command, url, db, asked, watcher)
        with cli.reachable(options) as (reached, simulated), _store(db, given["db"]) as store:
            there = msgspec.structs.replace(options, url=reached)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                sweep = runner.run(self._session_of(there, options.url, simulated, store, watcher))
        _write(sweep, given)
        return sweep

    def _watcher(self) -> Watcher:
        from loadgen.report.live import Progress

        return Progress() if self._progress else _Log()

    async def _session_of(
        self, there: Options, shown: str, simulated: bool, store: Store | None, watcher: Watcher
    ) -> Sweep:
        from loadgen.session import Session

        self._session = Session(there, watcher, store=store, simulated=simulated, shown_url=shown)
        self._loop = asyncio.get_running_loop()
        if self._stopped.is_set():
            raise asyncio.CancelledError
        return await self._session.run()


def _wait(measurement: _Measurement) -> Sweep:
    try:
        return measurement.result.result()
    except KeyboardInterrupt:
        measurement.stop()
        with suppress(asyncio.CancelledError):  # there was no level yet to be kept
            measurement.result.result()
        raise


async def _awaited(measurement: _Measurement) -> Sweep:
    waiting = asyncio.wrap_future(measurement.result)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        measurement.stop()
        await asyncio.wait([waiting])
        with suppress(BaseException):
            waiting.result()
        raise


class _Log:
    """How it goes, for whoever reads the log; nobody's terminal is written to."""

    def note(self, text: str) -> None:
        log.info("note: %s", text)

    def level_began(self, number: int, upcoming: Upcoming, *, simulated: bool) -> None:
        from loadgen.report.live import place_text

        parts = (place_text(number, upcoming, simulated=simulated), upcoming.why, upcoming.left)
        log.info("level %s", " · ".join(filter(None, parts)))

    def level_moved(self, state: Moment) -> None:
        log.debug("%.0f %% done, %d in flight", 100 * state.share, state.in_flight)

    def level_ended(self, number: int, level: Level) -> None:
        from loadgen.report.terminal import level_line

        log.info("level %d: %s", number, level_line(level))

    def close(self) -> None:
        """A log has nothing to take back."""


@contextmanager
def _store(db: str | Path | bool | None, path: str | None) -> Iterator[Store | None]:
    if db is False:
        yield None
        return
    from agent.store import Store

    try:
        store = Store(Path(path) if path else None)
    except StoreError as error:
        if path is not None:
            raise
        warnings.warn(f"{error}; this run is not kept", stacklevel=2)
        yield None
        return
    with store:
        yield store


def _write(sweep: Sweep, given: Mapping[str, Any]) -> None:
    from loadgen import output

    for form in FILES:
        path = given[f"{form}_file"]
        try:
            if path is not None:
                Path(path).write_bytes(output.rendered(sweep, form))
        except OSError as error:
            raise UsageError(
                f"{form}={path!r}: {error.strerror or error}; the run is {sweep.run.id}, "
                "for loadgen.load"
            ) from error


# --------------------------------------------------------------------------------------- options


def _parsed(
    name: str,
    url: str | None,
    db: str | Path | bool | None,
    options: Mapping[str, Any],
    watcher: Watcher,
) -> tuple[Options, dict[str, Any]]:
    """The options as the command line would have them, and what it was given."""
    from loadgen import asked, cli, config, limits

    command = cli.cli.commands[name]
    given_db = {} if db is None or isinstance(db, bool) else {"db": db}
    words = _arguments(command, {**options, **given_db})
    words += [] if url is None else ["--", url]
    try:
        with command.make_context(name, list(words)) as context:
            target, given = asked.asked(context, watcher.note)
            for form in FILES:
                if given[f"{form}_file"] == "-":
                    raise UsageError(f"{form}='-': a function returns its result; name a file")
                config.check_writable(given[f"{form}_file"], f"--{form}")
            made = asked.options_of(target, given)
            added = [*asked.from_elsewhere(), *given.get("added", ())]
    except click.ClickException as error:
        raise UsageError(error.format_message()) from error
    limits.check_streams(max(made.concurrency, default=0))
    line = asked.command_line([name, *_shown(words), *added])
    return msgspec.structs.replace(made, command=line), given


def _shown(words: list[str]) -> list[str]:
    """As one would type it: the URL first."""
    return [*words[-1:], *words[:-2]] if "--" in words[-2:-1] else words


def _arguments(command: click.Command, options: Mapping[str, Any]) -> list[str]:
    """Keywords as flags. Raises TypeError that names the nearest for an unknown one."""
    known = {
        max(parameter.opts, key=len).removeprefix("--").replace("-", "_"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
    known = {name: option for name, option in known.items() if name not in ONLY_COMMANDS}
    words = []
    for name, value in options.items():
        if name in ONLY_COMMANDS:
            raise TypeError(f"{command.name}(): {name!r} is of the command line only")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(f"{command.name}() has no option {name!r}, nearest is {near!r}")
        words += _flags(known[name], value)
    return words


def _flags(option: click.Option, value: Any) -> list[str]:
    """One keyword as command-line words; a flag and its value are one word, whatever it holds."""
    flag = option.opts[0]
    if value is None:
        return []
    if option.is_flag:
        return [flag] if value else list(option.secondary_opts[:1])
    if isinstance(value, Mapping):
        value = [f"{name}: {text}" for name, text in value.items()]
    if not option.multiple:
        return [f"{flag}={_text(value)}"]
    return [f"{flag}={item}" for item in ([value] if isinstance(value, str) else value)]


def _text(value: Any) -> str:
    if isinstance(value, Slo):
        from agent.sizing.curve import format_slo

        return format_slo([value])
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(_text(item) for item in value)
    return str(value)
