"""`loadgen`: parse, wire, exit code. Everything heavy is imported where it is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import __version__
from loadgen.asked import SOURCES, asked, nearest, options_of
from loadgen.flags import load_options, option
from loadgen.output import rendered, write, write_all

if TYPE_CHECKING:
    from agent.model import Sweep
    from agent.store import Store
    from loadgen.compare import Side
    from loadgen.config import Options

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


@cli.command()
@click.argument("url", required=False)
@option("--concurrency", metavar="N,N,…|auto",
         help="Streams held, a level each, or searched.  [default: 1,2,4,8,16,32,64]")  # fmt: skip
@option("--rate", metavar="X,X,…|auto",
         help="Requests per second (open loop), searched, or stages: 30s@2,60s@2-9.")  # fmt: skip
@click.option("--resume", metavar="RUN", help="Go on with a run that was stopped or killed.")
@click.option("--demo", is_flag=True, help="A simulated server with small settings: under 60 s.")
@load_options
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
@option("--concurrency", metavar="N", help="Streams held.  [default: 1]")
@option("--rate", metavar="X", help="Requests per second (open loop).")
@load_options
@click.pass_context
def run(context: click.Context, /, url: str | None, **given: Any) -> None:
    """Measure one load point; the same options and output as sweep, with one level."""
    context.exit(_measure(*asked(context, _tell), single=True))


# -------------------------------------------------------------------------------------- measuring


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _go_on(context: click.Context) -> int:
    """Measures what a run lacks; returns the exit code."""
    given = dict(context.params)
    run, url, demo = given.pop("resume"), given.pop("url"), given.pop("demo")
    if demo:
        raise click.UsageError("--resume goes on with its own target: leave --demo away")
    nearest(context, given)
    explicit = {name for name in given if context.get_parameter_source(name) in SOURCES}
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
    failed = write_all(result, files, quiet=given["quiet"])
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

    from loadgen.report.live import Progress
    from loadgen.session import Session

    progress = Progress(
        quiet=given["quiet"], live=False if given["no_progress"] else None,
        ended=resumed.levels if resumed is not None else (),
    )  # fmt: skip
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


def _show(sweep: Sweep, out: Any) -> None:
    from loadgen.report.terminal import show

    show(sweep, out)


# -------------------------------------------------------------------------------------- calibrate


@cli.command()
@option("--bound", default="5ms", show_default=True, metavar="TIME",
         help="How far TTFT and ITL may be from the truth.")  # fmt: skip
@click.option("--quick", is_flag=True, help="A look in some seconds; it is not kept.")
@option("--json", "json_file", metavar="FILE|-", help="Write the result as JSON.")
@option("--quiet", is_flag=True, help="No progress and no table.")
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
    from loadgen.report.live import Progress
    from loadgen.report.terminal import calibration_tables

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
        failed = not write(text, json_file, quiet=quiet)
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
@option("--db", metavar="FILE", help="Database.  [default: in your data directory]")
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
@option("--db", metavar="FILE", help="Database.  [default: in your data directory]")
@click.option("--html", metavar="FILE", help="Write the report, one HTML file.")
@click.option("--svg", metavar="FILE|-", help="Write the main curve as a picture.")
@click.option("--png", metavar="FILE|-", help="The same; drawn by Chromium or Chrome.")
@click.option("--card", metavar="FILE|-", help="Write the result as Markdown, to paste somewhere.")
def report(run: str, db: str | None, **files: str | None) -> None:
    """Show a run again: its table and verdict, its HTML report, a picture, a card.

    RUN is an id, the beginning of one, or latest.
    """
    if list(files.values()).count("-") > 1:
        raise click.UsageError("only one of --html, --svg, --png and --card can go to stdout")
    with _reading(db) as store:
        sweep = store.load(run)
    if set(files.values()) == {None}:
        _show(sweep, sys.stdout)
    for form, path in files.items():
        if path is not None:
            _export(sweep, form, path)


@cli.command()
@click.argument("run", metavar="RUN", default="latest")
@option("--db", metavar="FILE", help="Database.  [default: in your data directory]")
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
        if not write(msgspec.json.encode(document) + b"\n", path):
            raise click.exceptions.Exit(2)


def _export(sweep: Sweep, form: str, path: str) -> None:
    from loadgen import config

    config.check_writable(path, "the output file")
    if not write(rendered(sweep, form), path):
        raise click.exceptions.Exit(2)


@cli.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@option("--db", metavar="FILE", help="Database.  [default: in your data directory]")
@click.option("--fail-on", metavar="RULES",
              help="Exit 1 where a change goes beyond its bound and is not noise: "
                   "'output_tokens_per_s<-5%,ttft_ms.p95>+10%'.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Seed of the bootstrap.")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE|-", help="Write the comparison as JSON.")
@click.option("--html", "html_file", metavar="FILE|-", help="Write it as one HTML file.")
@click.option("--quiet", is_flag=True, help="No table.")
def compare(
    a: str,
    b: str,
    db: str | None,
    fail_on: str | None,
    seed: int,
    json_file: str | None,
    html_file: str | None,
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
    from loadgen.report.beside import render
    from loadgen.report.terminal import show_comparison

    if json_file == html_file == "-":
        raise click.UsageError("only one of --json and --html can go to stdout: name a file")
    config.check_writable(json_file, "--json")
    config.check_writable(html_file, "--html")
    rules = comparing.parse_rules(fail_on) if fail_on else []
    one, other = _side(a, db), _side(b, db)
    result = comparing.compare(one, other, rules, seed=seed)
    if not quiet:
        show_comparison(result, sys.stderr if "-" in (json_file, html_file) else sys.stdout)
    failed = bool(json_file) and not write(encode(result) + b"\n", str(json_file), quiet=quiet)
    if html_file:
        page = render(result, one.sweep, other.sweep)
        failed |= not write(page.encode(), html_file, quiet=quiet)
    if failed:
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
