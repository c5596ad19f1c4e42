"""`loadgen`: parse, wire, exit code. Everything heavy is imported where it is used."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from agent import __version__

if TYPE_CHECKING:
    from agent.model import Sweep
    from agent.store import Store
    from loadgen.compare import Side
    from loadgen.config import Options

ENDPOINTS = ("chat", "completions", "responses", "embeddings", "rerank")
GENERATING = ("chat", "completions", "responses")  # endpoints that no embedding model has
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="loadgen")
def cli() -> None:
    """Measures an LLM inference server and says how its hardware fits the load.

    \b
    loadgen sweep --demo                          a simulated server, nothing else needed
    loadgen sweep http://127.0.0.1:8000           throughput and latency against concurrency
    loadgen sweep http://HOST:8000 --concurrency 1,4,16,64 --slo 'ttft:p95<500ms' --html out.html
    loadgen run http://127.0.0.1:8000 --concurrency 8      one load point
    """


# ---------------------------------------------------------------------------------------- options


class _HeaderLine(click.types.StringParamType):
    """In LOADGEN_HEADER one a line: a header has a space in it."""

    envvar_list_splitter = "\n"


def _option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that LOADGEN_NAME in the environment sets too."""
    long = next(name for name in names if name.startswith("--"))
    variable = long.split("/")[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=f"LOADGEN_{variable}", **settings)


def _read_config(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Options from a TOML file: the names of the flags, `_` or `-`, lists where lists are asked."""
    if path is None:
        return
    import difflib
    import tomllib

    from agent.model import UsageError
    from loadgen.config import read_text

    try:
        values = tomllib.loads(read_text(path, "--config"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: not TOML: {error}") from error
    known = {
        flag.removeprefix("--").replace("-", "_"): parameter.name or ""
        for parameter in context.command.params
        for flag in parameter.opts
        if flag not in ("--config", "--help")
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UsageError(f"--config {path}: unknown key {key!r}, nearest is {near[0]!r}")
        if isinstance(value, dict):
            raise UsageError(f"--config {path}: {key} is a table, and no option takes one")
        if name == "header":
            value = value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            value = ",".join(str(item) for item in value)
        defaults[known[name]] = value
    context.default_map = {**(context.default_map or {}), **defaults}


_LOAD_OPTIONS = [
    click.option("--config", is_eager=True, expose_value=False, callback=_read_config,
                 metavar="FILE", envvar="LOADGEN_CONFIG", help="Options from TOML; flags win."),
    _option("--model", help="Model to ask for.  [default: the first of /v1/models]"),
    _option("--endpoint", type=click.Choice(ENDPOINTS), default="chat",
            show_default=True, help="API to drive."),
    _option("--stream/--no-stream", default=True, show_default=True,
            help="Stream the replies; without, there is no TTFT and no ITL."),
    _option("--arrival", default="poisson", show_default=True,
            help="Arrivals of the open loop: poisson, constant or gamma:CV."),
    _option("--input-tokens", metavar="LENGTH",
            help="Prompt: N, normal:M:SD, lognormal:M:SD, uniform:A:B.  [default: 512]"),
    _option("--output-tokens", metavar="LENGTH",
            help="Reply, likewise.  [default: 128, or as recorded]"),
    _option("--prefix-tokens", type=click.IntRange(0), default=0, metavar="N",
            help="Shared tokens in front of every prompt's own."),
    _option("--prefixes", type=click.IntRange(1), default=1, metavar="K",
            help="So many different ones of them."),
    _option("--dataset", metavar="FILE", help="Prompts from a ShareGPT JSON or plain JSONL file."),
    _option("--trace", metavar="FILE",
            help="Lengths and instants as recorded: Azure or BurstGPT CSV, Mooncake JSONL."),
    _option("--speedup", metavar="X,X,…", help="So many times as fast as recorded, a level each."),
    _option("--workload-from", metavar="URL|FILE",
            help="Lengths and rate as an agent observed them."),
    _option("--turns", type=click.IntRange(1), default=1, metavar="N",
            help="Conversations of N turns, each with its history."),
    _option("--think-time", metavar="TIME", help="Between a reply and the next turn."),
    _option("--mix", metavar="MODEL=WEIGHT,…", help="Several models or LoRA names at once."),
    _option("--tokenizer", metavar="PATH",
            help="A tokenizer.json, where the server does not count prompts (extra)."),
    _option("--reuse-prompts", is_flag=True,
            help="One prompt for all requests: a prefix cache may answer."),
    _option("--requests", type=click.IntRange(1), metavar="N",
            help="Requests per level.  [default: 5 a stream, at least 20]"),
    _option("--duration", metavar="TIME",
            help="Time per level instead.  [open loop default: 30s]"),
    _option("--warmup", default="0", show_default=True, metavar="N|TIME",
            help="Requests, or time, before each level's measurement."),
    _option("--repeats", type=click.IntRange(1), default=1, show_default=True, metavar="N",
            help="Run the whole list of levels N times."),
    _option("--budget", metavar="TIME",
            help="Limit for all levels together.  [default with auto: 5m]"),
    _option("--slo", metavar="RULES", help="Such as 'ttft:p95<500ms,itl:p95<50ms,e2e:p99<30s'."),
    _option("--timeout", default="300s", show_default=True, metavar="TIME",
            help="Limit for one request."),
    _option("--api-key-file", metavar="FILE", help="Key to send; else OPENAI_API_KEY."),
    _option("--header", multiple=True, type=_HeaderLine(), metavar="'NAME: VALUE'",
            help="Further header; repeatable."),
    _option("--ca-file", metavar="FILE", help="CA certificates to trust."),
    _option("--insecure", is_flag=True, help="Do not verify the server's certificate."),
    _option("--metrics-url", metavar="URL|none",
            help="The server's metrics page.  [default: found on the target]"),
    _option("--processes", default="auto", show_default=True, metavar="N|auto",
            help="Load-generating processes that share a level."),
    _option("--seed", type=int, default=0, show_default=True, metavar="N",
            help="Seed of lengths and arrivals."),
    _option("--expect-concurrency", type=click.FloatRange(0, min_open=True), metavar="N",
            help="Judge against this many requests at once."),
    _option("--expect-rps", type=click.FloatRange(0, min_open=True), metavar="X",
            help="Judge against this many requests a second."),
    _option("--fail-on", metavar="RULE",
            help="Exit 1 on: slo, invalid, or a finding such as UNDER_SIZED; several by commas."),
    _option("--db", metavar="FILE", help="Database.  [default: in your data directory]"),
    _option("--json", "json_file", metavar="FILE|-", help="Write the result as JSON."),
    _option("--html", "html_file", metavar="FILE", help="Write the report, one HTML file."),
    _option("--csv", "csv_file", metavar="FILE|-", help="Write the levels as CSV."),
    _option("--otlp-endpoint", metavar="URL", help="Send a span per request there, OTLP/HTTP."),
    _option("--yes", is_flag=True, help="Go on although the server is busy with others."),
    _option("--quiet", is_flag=True, help="No progress and no table."),
    _option("--no-progress", is_flag=True, help="Plain lines instead of a live display."),
]  # fmt: skip


def _load_options(function: Any) -> Any:
    for option in reversed(_LOAD_OPTIONS):
        function = option(function)
    return function


@cli.command()
@click.argument("url", required=False)
@_option("--concurrency", metavar="N,N,…|auto",
         help="Streams held, a level each, or searched.  [default: 1,2,4,8,16,32,64]")  # fmt: skip
@_option("--rate", metavar="X,X,…|auto",
         help="Requests per second (open loop), searched, or stages: 30s@2,60s@2-9.")  # fmt: skip
@click.option("--resume", metavar="RUN", help="Go on with a run that was stopped or killed.")
@click.option("--demo", is_flag=True, help="A simulated server with small settings: under 60 s.")
@_load_options
@click.pass_context
def sweep(
    context: click.Context, /, url: str | None, demo: bool, resume: str | None, **given: Any
) -> None:
    """Find tokens/s, TTFT and ITL against concurrency (or request rate) and judge the hardware.

    URL is a base URL with or without /v1, or sim:GPU/MODEL for the simulated engine, such as
    sim:h100-sxm/llama-3.1-8b. Without a URL the server that runs on this machine is found, and a
    quick sweep answers in about a minute.
    """
    if context.params["resume"] is not None:
        context.exit(_go_on(context))
    context.exit(_measure(*asked(context, _tell)))


@cli.command()
@click.argument("url", required=False)
@_option("--concurrency", metavar="N", help="Streams held.  [default: 1]")
@_option("--rate", metavar="X", help="Requests per second (open loop).")
@_load_options
@click.pass_context
def run(context: click.Context, /, url: str | None, **given: Any) -> None:
    """Measure one load point; the same options and output as sweep, with one level."""
    context.exit(_measure(*asked(context, _tell), single=True))


def asked(context: click.Context, tell: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """What a parsed `sweep` or `run` asks for: the target, found if need be, and the options.

    Raises click.UsageError, and of finding a target UsageError and TargetError.
    """
    given = dict(context.params)
    url, demo = given.pop("url"), given.pop("demo", False)
    _nearest(context, given)
    if context.command is run:
        _single(given)
    if demo:
        return _demo(url, given)
    if url is None:
        url = _found(context, given, tell)
    return url, given


def _tell(line: str) -> None:
    click.echo(line, err=True)


LOADS = ("concurrency", "rate", "trace", "workload_from")  # options that say what the levels are


def _single(given: dict[str, Any]) -> None:
    from loadgen import config

    given["single"] = True
    for option in ("concurrency", "rate", "speedup"):
        if given[option] and "," in given[option] and "@" not in given[option]:
            raise click.UsageError(f"run takes one --{option}; sweep takes a list")
        if config.is_auto(given[option]):
            raise click.UsageError(f"run takes a number as --{option}; sweep searches (auto)")
    if not any(given[name] for name in LOADS):
        given["concurrency"] = "1"


def _found(context: click.Context, given: dict[str, Any], tell: Callable[[str], None]) -> str:
    """The URL of the server on this machine; what was found and is added goes into the command."""
    import asyncio

    from agent.words import printable
    from loadgen import config, find

    headers = config.request_headers(given["header"], given["api_key_file"])
    found = asyncio.run(find.look(headers, find.PORTS))
    for one in find.usable(found):
        tell(printable(f"found: {one.line()}"))
    one = find.the_one(found, context.info_name or "sweep")
    added = [one.url]
    if len(one.models) > 1 and not given["model"] and given["endpoint"] in GENERATING:
        given["model"] = one.models[0]
        added += ["--model", one.models[0]]
    if not any(given[name] for name in LOADS):
        for name, value in config.QUICK.items():
            if given[name] is None:
                given[name] = value
                added += [f"--{name.replace('_', '-')}", value]
    given["added"] = added
    return one.url


_SOURCES = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)


def _nearest(context: click.Context, given: dict[str, Any]) -> None:
    """Of two options that exclude each other, one from further away gives way.

    A flag wins over the environment, and that over a file; both from one place contradict it.
    """
    for pair in (("concurrency", "rate"), ("requests", "duration")):
        if any(given[name] is None for name in pair):
            continue
        sources = [context.get_parameter_source(name) for name in pair]
        ranks = [_SOURCES.index(source) for source in sources if source in _SOURCES]
        if len(ranks) == 2 and ranks[0] != ranks[1]:
            further = pair[ranks.index(max(ranks))]
            given[further] = context.params[further] = None


def _demo(url: str | None, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    from loadgen import config

    if url is not None:
        raise click.UsageError("--demo brings its own target: leave the URL away")

    if not given["concurrency"] and not given["rate"]:
        most = given["requests"] or config.CONCURRENCY_MAX
        given["concurrency"] = ",".join(str(n) for n in config.DEMO_CONCURRENCY if n <= most)
    searched = config.is_auto(given["concurrency"]) or config.is_auto(given["rate"])
    if given["duration"] is None and given["requests"] is None and not searched:
        given["duration"] = f"{config.DEMO_DURATION_S}s"
    given["input_tokens"] = given["input_tokens"] or str(config.DEMO_INPUT_TOKENS)
    given["output_tokens"] = given["output_tokens"] or str(config.DEMO_OUTPUT_TOKENS)
    given["slo"] = given["slo"] or config.DEMO_SLO
    if given["expect_concurrency"] is None and given["expect_rps"] is None:
        given["expect_concurrency"] = config.DEMO_EXPECT_CONCURRENCY
    return config.DEMO_SPEC, given


# -------------------------------------------------------------------------------------- measuring


def options_of(url: str, given: dict[str, Any]) -> Options:
    from agent.sizing.curve import parse_slo
    from loadgen import config

    warmup_requests, warmup_s = config.parse_warmup(given["warmup"])
    concurrency, rates, stages, auto = config.parse_loads(given["concurrency"], given["rate"])
    workload = _workload(given)
    observed_rps = workload.pop("rates_rps")
    if not any((concurrency, rates, stages, auto)):
        rates = observed_rps
    if not any((concurrency, rates, stages, auto, given["trace"])):
        concurrency = config.DEFAULT_CONCURRENCY
        if given["requests"] is not None:
            concurrency = tuple(n for n in concurrency if n <= given["requests"])
    duration, budget = given["duration"], given["budget"]
    if given["output_tokens"] and given["endpoint"] in ("embeddings", "rerank"):
        raise click.UsageError(
            f"--endpoint {given['endpoint']} generates nothing: leave --output-tokens away"
        )
    return config.check(
        config.Options(
            url=url,
            model=given["model"],
            endpoint=given["endpoint"],
            stream=given["stream"],
            concurrency=concurrency,
            rates_rps=rates,
            auto=auto,
            budget_s=config.parse_duration(budget, "--budget") if budget else None,
            arrival=given["arrival"],
            **workload,
            stages=stages,
            processes=config.parse_processes(given["processes"]),
            tokenizer=given["tokenizer"],
            reuse_prompts=given["reuse_prompts"],
            repeats=given["repeats"],
            requests=given["requests"],
            duration_s=config.parse_duration(duration, "--duration") if duration else None,
            warmup_requests=warmup_requests,
            warmup_s=warmup_s,
            slo=tuple(parse_slo(given["slo"])) if given["slo"] else (),
            timeout_s=config.parse_duration(given["timeout"], "--timeout"),
            headers=config.request_headers(given["header"], given["api_key_file"]),
            ca_file=given["ca_file"],
            insecure=given["insecure"],
            metrics_url=given["metrics_url"],
            seed=given["seed"],
            expect_concurrency=given["expect_concurrency"],
            expect_rps=given["expect_rps"],
            fail_on=config.parse_fail_on(given["fail_on"]),
            otlp_endpoint=given["otlp_endpoint"],
            yes=given["yes"],
            command=_command(given.get("added", ())),
        )
    )


def _go_on(context: click.Context) -> int:
    """Measures what a run lacks; returns the exit code."""
    given = dict(context.params)
    run, url, demo = given.pop("resume"), given.pop("url"), given.pop("demo")
    if demo:
        raise click.UsageError("--resume goes on with its own target: leave --demo away")
    _nearest(context, given)
    explicit = {name for name in given if context.get_parameter_source(name) in _SOURCES}
    begun = _begun(run, url, given, explicit)
    return _measure(begun[0].url, given, begun=begun)


def _begun(
    run: str, url: str | None, given: dict[str, Any], explicit: set[str]
) -> tuple[Options, Sweep]:
    """The options and the levels of a run that is to be gone on with."""
    import msgspec

    from loadgen import config
    from loadgen.resume import take_up

    with _reading(given["db"]) as store:
        kept = store.kept(run)
    # A gate may be new, and be of an SLO that only the run knows.
    asked = options_of(url or "", given | {"fail_on": None})
    options, begun = take_up(kept, asked, (explicit - {"fail_on"}) | ({"url"} if url else set()))
    if given["fail_on"]:
        gates = config.parse_fail_on(given["fail_on"])
        options = msgspec.structs.replace(options, fail_on=gates)
    return config.check(options), begun


def _workload(given: dict[str, Any]) -> dict[str, Any]:
    """What requests say and how long they are; `rates_rps` are those of an observed pattern."""
    from agent.model import UsageError
    from loadgen import config, lengths, workload

    recorded = given["dataset"] or given["trace"]
    if recorded and given["input_tokens"]:
        raise UsageError("--input-tokens: prompts of a --dataset or --trace have their own length")
    found: dict[str, Any] = {
        "rates_rps": (),
        "input_tokens": lengths.Fixed(config.DEFAULT_INPUT_TOKENS),
        "output_tokens": None if recorded else lengths.Fixed(config.DEFAULT_OUTPUT_TOKENS),
    }
    if given["workload_from"]:
        from loadgen.observed import pattern_from

        pattern = pattern_from(given["workload_from"])
        known = {
            "input_tokens": pattern.input_tokens,
            "output_tokens": pattern.output_tokens,
        }
        found |= {name: length for name, length in known.items() if length is not None}
        found["rates_rps"] = config.rates_around(
            pattern.rate_rps, single=given.get("single", False)
        )
        found["notes"] = tuple(pattern.notes)
    for name in ("input_tokens", "output_tokens"):
        if given[name]:
            found[name] = lengths.parse(given[name], f"--{name.replace('_', '-')}")
    names = ("prefix_tokens", "prefixes", "dataset", "trace", "turns")
    found |= {name: given[name] for name in names}
    if given["speedup"]:
        found["speedups"] = config.parse_speedups(given["speedup"])
    if given["think_time"]:
        found["think_s"] = config.parse_duration(given["think_time"], "--think-time")
    if given["mix"]:
        found["mix"] = workload.parse_mix(given["mix"])
    return found


def _command(added: Sequence[str] = ()) -> str:
    """The command that repeats this run: what was typed, then what came from elsewhere."""
    return command_line([*sys.argv[1:], *from_elsewhere(), *added])


def command_line(words: Sequence[str]) -> str:
    """`loadgen` with these arguments, to copy. Values of headers, maybe secrets, are left out."""
    words = ["loadgen", *words]
    for i, word in enumerate(words):
        if word == "--header" and i + 1 < len(words):
            words[i + 1] = words[i + 1].partition(":")[0] + ": …"
        elif word.startswith("--header="):
            words[i] = word.partition(":")[0] + ": …"
    # Arguments that are no UTF-8 arrive as lone surrogates, which no file takes.
    return shlex.join(words).encode("utf-8", "replace").decode()


def from_elsewhere() -> list[str]:
    """Options that the environment set, as flags. A --config file is among what was typed."""
    context = click.get_current_context(silent=True)
    words: list[str] = []
    for parameter in context.command.params if context else ():
        name = parameter.name or ""
        if context is None or not parameter.opts or not parameter.opts[0].startswith("-"):
            continue
        if context.get_parameter_source(name) is not ParameterSource.ENVIRONMENT:
            continue
        value = context.params.get(name)
        if value is None:
            continue  # it gave way to a flag
        if value is True:
            words.append(parameter.opts[0])
        elif value is False:
            words += parameter.secondary_opts[:1]
        else:
            for item in value if isinstance(value, tuple) else (value,):
                words += [parameter.opts[0], str(item)]
    return words


def _measure(
    url: str,
    given: dict[str, Any],
    *,
    single: bool = False,
    begun: tuple[Options, Sweep] | None = None,
) -> int:
    """Runs it all, or what is left of a run that was `begun`; returns the exit code."""
    from loadgen import config, limits
    from loadgen.outcome import exit_code

    files = {name: given[f"{name}_file"] for name in ("json", "html", "csv")}
    for name, path in files.items():
        config.check_writable(path, f"--{name}")
    if list(files.values()).count("-") > 1:
        raise click.UsageError("only one of --json and --csv can go to stdout: name a file")
    options, resumed = begun or (options_of(url, given), None)
    limits.check_streams(max(options.concurrency, default=0))  # a sim: inherits what it allows
    _terminate_as_interrupt()
    if resumed is not None and resumed.verdict is not None:
        click.echo(f"loadgen: run {resumed.run.id} is finished: nothing is left of it", err=True)
        result = resumed
    else:
        with reachable(options) as (reached, simulated), _store(given["db"]) as store:
            result = _run_session(options, reached, simulated, store, given, resumed)
    failed = _write_all(result, files, quiet=given["quiet"])
    if not given["quiet"]:
        _show(result, sys.stderr if "-" in files.values() else sys.stdout)
    return 2 if failed else exit_code(result, options.fail_on, single=single)


def _terminate_as_interrupt() -> None:
    """SIGTERM is Ctrl-C: what was started is stopped, and the exit code is 130."""
    import signal

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextmanager
def reachable(options: Options) -> Iterator[tuple[str, bool]]:
    """The address to measure, and whether it is simulated: sim: starts its server for as long."""
    if not options.url.startswith("sim:"):
        yield options.url, False
        return
    from loadgen.targets.process import started

    with started(options.url) as url:
        yield url, True


@contextmanager
def _store(path: str | None) -> Iterator[Store | None]:
    """The database; where the default one cannot be used, that is said and the run goes on."""
    from agent.model import StoreError
    from agent.store import Store

    try:
        store = Store(Path(path) if path else None)
    except StoreError as error:
        if path is not None:
            raise
        click.echo(f"loadgen: {error}; this run is not kept", err=True)
        yield None
        return
    with store:
        yield store


def _run_session(
    options: Options,
    reached: str,
    simulated: bool,
    store: Store | None,
    given: dict[str, Any],
    resumed: Sweep | None,
) -> Sweep:
    import asyncio
    import os
    import signal

    import msgspec
    import uvloop

    from loadgen.report.terminal import Progress
    from loadgen.session import Session

    progress = Progress(quiet=given["quiet"], live=False if given["no_progress"] else None)
    reachable = msgspec.structs.replace(options, url=reached)

    async def main() -> Sweep:
        session = Session(
            reachable,
            progress,
            store=store,
            simulated=simulated,
            shown_url=options.url,
            resumed=resumed,
        )
        again = False

        def interrupted() -> None:
            nonlocal again
            if again:
                progress.note("ended at once; finished levels are in the store")
                os._exit(130)
            again = True
            if session.began:
                progress.note("interrupted: keeping what was measured; once more ends at once")
            session.interrupt()

        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, interrupted)
        return await session.run()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None  # before the first level
    finally:
        _terminate_as_interrupt()  # the loop took its own handler away


# ---------------------------------------------------------------------------------------- output


def rendered(sweep: Sweep, form: str) -> bytes:
    if form == "json":
        from agent.model import encode

        return encode(sweep) + b"\n"
    if form == "csv":
        from loadgen.report.table import levels_csv

        return levels_csv(sweep).encode()
    if form == "parquet":
        from loadgen.report.table import levels_parquet

        return levels_parquet(sweep)
    from loadgen.report.html import render

    return render(sweep).encode()


def _write_all(sweep: Sweep, files: dict[str, str | None], *, quiet: bool) -> bool:
    """Writes what was asked for; True where a file could not be written."""
    failed = False
    for form, path in files.items():
        if path is not None:
            failed |= not _write(rendered(sweep, form), path, quiet=quiet)
    return failed


def _write(data: bytes, path: str, *, quiet: bool = False) -> bool:
    """Never raises: what was measured must not be lost at the very end."""
    from agent.failures import abandon

    try:
        if path == "-":
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
            return True
        Path(path).write_bytes(data)
    except BrokenPipeError:
        abandon(sys.stdout)  # the reader has gone (`| head`), and wanted no more
        return True
    except OSError as error:
        if path == "-":
            abandon(sys.stdout)
        where, name = ("stdout", "result") if path == "-" else (path, Path(path).name)
        rescued = _rescue(data, name)
        click.echo(f"loadgen: {where}: {error.strerror or error}; {rescued}", err=True)
        return False
    if not quiet:
        click.echo(f"wrote {path}", err=True)
    return True


def _rescue(data: bytes, name: str) -> str:
    """A result that cannot go where it should goes to the temporary directory instead."""
    import os
    import tempfile
    from contextlib import suppress

    path = ""
    try:
        handle, path = tempfile.mkstemp(prefix="servefit-", suffix=f"-{name}")
        with open(handle, "wb") as out:
            out.write(data)
    except OSError:
        with suppress(OSError):
            os.unlink(path)
        return "`loadgen export` gives it again once there is room"
    return f"it is kept as {path}"


def _show(sweep: Sweep, out: Any) -> None:
    from loadgen.report.terminal import show

    show(sweep, out)


# -------------------------------------------------------------------------------------- calibrate


@cli.command()
@_option("--bound", default="5ms", show_default=True, metavar="TIME",
         help="How far TTFT and ITL may be from the truth.")  # fmt: skip
@click.option("--quick", is_flag=True, help="A look in some seconds; it is not kept.")
@_option("--json", "json_file", metavar="FILE|-", help="Write the result as JSON.")
@_option("--quiet", is_flag=True, help="No progress and no table.")
def calibrate(bound: str, quick: bool, json_file: str | None, quiet: bool) -> None:
    """Find what this machine can measure, against a built-in server of exactly known timing.

    The most streams, token events and requests a second at which our own error stays within
    --bound; about a minute. It is kept for this machine, and sweep starts as many processes as it
    makes necessary. Let nothing else run meanwhile.
    """
    from loadgen import config

    bound_ms = config.parse_duration(bound, "--bound") * 1e3
    config.check_writable(json_file, "--json")
    raise click.exceptions.Exit(_calibrate(bound_ms, quick, json_file, quiet))


def _calibrate(bound_ms: float, quick: bool, json_file: str | None, quiet: bool) -> int:
    """0: found and kept; 3: not even the smallest load could be measured."""
    import asyncio
    import signal

    import msgspec
    import uvloop

    from loadgen.calibrate import FULL, QUICK, Calibrator, Result, conclusion, save
    from loadgen.report.terminal import Progress, calibration_tables

    progress = Progress(quiet=quiet)
    calibrator = Calibrator(
        bound_ms=bound_ms, effort=QUICK if quick else FULL, say=progress.line, note=progress.note
    )

    async def main() -> Result:
        task = asyncio.current_task()
        assert task is not None
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, task.cancel)
        return await calibrator.run()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    failed = False
    if json_file is not None:
        text = msgspec.json.format(msgspec.json.encode(result)) + b"\n"
        failed = not _write(text, json_file, quiet=quiet)
    if not quiet:
        out = sys.stderr if json_file == "-" else sys.stdout
        calibration_tables(result, out)
        click.echo("\n".join(conclusion(result)), file=out)
    if result.calibration is not None and not quick:
        path = save(result.calibration)
        progress.line(f"kept in {path}")
    return 2 if failed else 3 if result.calibration is None else 0


# --------------------------------------------------------------------------------- from the store


@cli.command()
@_option("--db", metavar="FILE", help="Database.  [default: in your data directory]")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, metavar="N",
              help="At most so many.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def runs(db: str | None, limit: int, as_json: bool) -> None:
    """List the runs in the store, newest first."""
    with _reading(db) as store:
        rows = store.runs(limit)
    if as_json:
        import json

        click.echo(json.dumps(rows, indent=2))
    elif rows:
        from loadgen.report.terminal import run_table

        run_table(rows)
    else:
        click.echo("no runs yet: `loadgen sweep --demo` makes one", err=True)


@cli.command()
@click.argument("run", metavar="RUN", default="latest")
@_option("--db", metavar="FILE", help="Database.  [default: in your data directory]")
@click.option("--html", "html_file", metavar="FILE", help="Write the report, one HTML file.")
def report(run: str, db: str | None, html_file: str | None) -> None:
    """Show a run again: its table and verdict, or its HTML report.

    RUN is an id, the beginning of one, or latest.
    """
    with _reading(db) as store:
        sweep = store.load(run)
    if html_file is None:
        _show(sweep, sys.stdout)
    else:
        _export(sweep, "html", html_file)


@cli.command()
@click.argument("run", metavar="RUN", default="latest")
@_option("--db", metavar="FILE", help="Database.  [default: in your data directory]")
@click.option("--format", "form", default="json", show_default=True,
              type=click.Choice(["json", "csv", "parquet", "aiperf", "guidellm", "vllm"]),
              help="All of the run, a row a level, or another tool's file.")  # fmt: skip
@click.option("--output", "-o", default="-", metavar="FILE|DIR|-",
              help="Where to; of aiperf, guidellm and vllm a directory.  [default: -]")  # fmt: skip
def export(run: str, db: str | None, form: str, output: str) -> None:
    """Write a run from the store: as JSON, its levels as CSV or Parquet, or for another tool.

    \b
    aiperf     profile_export_aiperf.json, a folder for each level
    guidellm   benchmarks.json
    vllm       the result JSON of vllm bench serve, a file for each level
    """
    with _reading(db) as store:
        sweep = store.load(run)
        rows = store.requests(sweep.run.id) if form in ("aiperf", "guidellm", "vllm") else []
    if form in ("aiperf", "guidellm", "vllm"):
        _export_for(form, sweep, rows, output)
    else:
        _export(sweep, form, output)


def _export_for(form: str, sweep: Sweep, rows: list[dict[str, Any]], output: str) -> None:
    """Another tool's files into a directory; where there is one only, it may have a name too."""
    import msgspec

    from agent.model import UsageError
    from loadgen import config
    from loadgen.kept import by_level
    from loadgen.report.others import documents

    files = documents(form, sweep, by_level(rows, len(sweep.levels)))
    named = output == "-" or output.endswith(".json")
    if named and len(files) > 1:
        raise UsageError(
            f"run {sweep.run.id} has {len(files)} levels, and {form} has one in a file: "
            "--output DIR puts each in a file of its own"
        )
    for name, document in files.items():
        path = output
        if not named:
            path = str(Path(output) / name)
            config.make_directory(Path(path).parent, "--output")
        config.check_writable(path, "--output")
        if not _write(msgspec.json.encode(document) + b"\n", path):
            raise click.exceptions.Exit(2)


def _export(sweep: Sweep, form: str, path: str) -> None:
    from loadgen import config

    config.check_writable(path, "the output file")
    if not _write(rendered(sweep, form), path):
        raise click.exceptions.Exit(2)


@cli.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@_option("--db", metavar="FILE", help="Database.  [default: in your data directory]")
@click.option("--fail-on", metavar="RULES",
              help="Exit 1 where a change goes beyond its bound and is not noise: "
                   "'output_tokens_per_s<-5%,ttft_ms.p95>+10%'.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Seed of the bootstrap.")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE|-", help="Write the comparison as JSON.")
@click.option("--quiet", is_flag=True, help="No table.")
def compare(
    a: str,
    b: str,
    db: str | None,
    fail_on: str | None,
    seed: int,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Compare run B with run A, load by load: what changed, and what is only noise.

    A and B are runs as for report, or files that --json wrote (name.json). Where the store has
    their requests the noise is resampled from them.
    """
    from agent.model import encode
    from loadgen import compare as comparing
    from loadgen import config
    from loadgen.outcome import comparison_exit_code
    from loadgen.report.terminal import show_comparison

    config.check_writable(json_file, "--json")
    rules = comparing.parse_rules(fail_on) if fail_on else []
    result = comparing.compare(_side(a, db), _side(b, db), rules, seed=seed)
    if not quiet:
        show_comparison(result, sys.stderr if json_file == "-" else sys.stdout)
    if json_file and not _write(encode(result) + b"\n", json_file, quiet=quiet):
        raise click.exceptions.Exit(2)
    raise click.exceptions.Exit(comparison_exit_code(result))


def _side(name: str, db: str | None) -> Side:
    """A run with its requests, or what a file has."""
    from agent.model import UsageError, decode_sweep
    from loadgen.compare import Side
    from loadgen.config import read_text
    from loadgen.kept import by_level

    if name.endswith(".json"):
        text = read_text(name, "compare")
        try:
            return Side(decode_sweep(text.encode()))
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    with _reading(db) as store:
        sweep = store.load(name)
        return Side(sweep, by_level(store.requests(sweep.run.id), len(sweep.levels)))


@contextmanager
def _reading(db: str | None) -> Iterator[Store]:
    from agent.model import UsageError
    from agent.store import Store, default_path

    path = Path(db) if db else default_path()
    if db and not path.exists():
        raise UsageError(f"--db {db}: no such file")
    with Store(path) as store:
        yield store


# ----------------------------------------------------------------------------------------- targets


@cli.group()
def serve() -> None:
    """Start a local target: the simulated engine, or a real vLLM with a small dummy model."""


_host = click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")


@serve.command("sim")
@click.argument("spec", default="sim:h100-sxm/llama-3.1-8b", metavar="[SPEC]")
@_host
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="0 takes any free port.")  # fmt: skip
def serve_sim(spec: str, host: str, port: int) -> None:
    """The simulated engine: continuous batching, paged KV cache, vLLM's API and metric names.

    SPEC is sim:GPU/MODEL[?key=value&…], such as sim:l4/llama-3.1-8b?max_num_seqs=8.
    """
    from loadgen.targets.sim import main as serve_main

    raise click.exceptions.Exit(serve_main([spec, "--host", host, "--port", str(port)]))


@serve.command("vllm")
@_host
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes any free port.",
)
@click.option(
    "--python",
    envvar="LOADGEN_VLLM_PYTHON",
    metavar="PATH",
    help="The interpreter that has vLLM.  [default: this one]",
)
@click.option("--model-dir", type=click.Path(path_type=Path), help="A model of your own.")
@click.option("--max-model-len", type=click.IntRange(16), default=2048, show_default=True,
              help="Tokens of prompt and reply together.")  # fmt: skip
@click.option("--max-num-seqs", type=click.IntRange(1), help="Admission cap.")
@click.option("--num-gpu-blocks", type=click.IntRange(1), help="KV blocks: makes KV the limit.")
@click.option("--log", type=click.Path(path_type=Path), help="Where vLLM's own output goes.")
@click.option("--otlp-traces-endpoint", metavar="URL", help="vLLM's own spans go there.")
@click.argument("extra", nargs=-1, metavar="[-- VLLM_ARGUMENTS…]")
def serve_vllm_command(extra: tuple[str, ...], **given: Any) -> None:
    """A real vLLM with a small dummy-weight model that it makes itself; on CPU or GPU."""
    from loadgen.targets.vllm import VllmOptions, serve_vllm

    serve_vllm(VllmOptions(**given, extra=extra))


# ------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: every failure of ours is one line on stderr and an exit code."""
    sys.exit(_guarded(argv))


def _guarded(argv: Sequence[str] | None) -> int:
    from agent.failures import guarded

    return guarded("loadgen", lambda: cli.main(argv, prog_name="loadgen", standalone_mode=False))


if __name__ == "__main__":
    main()
