"""`agent`: parse, wire, exit code. Everything heavy is imported where it is used."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import __version__
from agent.failures import guarded

if TYPE_CHECKING:
    from agent.forms import Sheet
    from agent.model import Sweep
    from agent.question import Series
    from agent.sizing.models import ModelShape

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="agent")
def cli() -> None:
    """Judges whether inference hardware fits its load.

    \b
    loadgen sweep http://127.0.0.1:8000 --json sweep.json
    agent assess --curve sweep.json --expect-concurrency 24
    """


_DB = click.option(
    "--db",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The agent's store.  [default: agent.db in your data directory]",
)


@cli.command()
@click.option("--server", metavar="NAME", help="Of this server.  [default: of each]")
@click.option("--service", metavar="NAME", help="Of all servers of this service together.")
@click.option(
    "--window", metavar="TIME", help="Observed time, up to the newest sample.  [default: 7d]"
)
@click.option(
    "--curve",
    metavar="SWEEP.json",
    help="Without a store: a measured curve, as loadgen --json writes it, or another tool's.",
)
@click.option(
    "--demand",
    metavar="FILE",
    help='With --curve: a declared demand, such as {"concurrency": {"p99": 24}}, or a trace.',
)
@click.option(
    "--slo",
    metavar="RULES",
    help="Such as 'ttft:p95<500ms,itl:p95<50ms'.  [default: --config's, else the sweep's own]",
)
@click.option(
    "--expect-concurrency",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="Judge against this many requests at once.",
)
@click.option(
    "--expect-rps",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="With --curve: judge against this many requests a second.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "markdown", "html"]),
    default="text",
    show_default=True,
    help="For people or for programs.",
)
@click.option(
    "--config", "file", metavar="FILE", help="The agent's: its store, window, SLO, expectation."
)
@_DB
def assess(
    server: str | None,
    service: str | None,
    window: str | None,
    curve: str | None,
    demand: str | None,
    slo: str | None,
    expect_concurrency: float | None,
    expect_rps: float | None,
    form: str,
    file: str | None,
    db: Path | None,
) -> None:
    """Say how the hardware fits: from the store, or a measured curve alone.

    \b
    agent assess --server chat --slo 'ttft:p95<500ms' --window 14d
    agent assess --curve sweep.json --expect-concurrency 24
    """
    from agent.model import UsageError

    for option, value in (
        ("--expect-concurrency", expect_concurrency),
        ("--expect-rps", expect_rps),
    ):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{option} {value}: write a finite number above 0")
    of_store = {"--server": server, "--service": service, "--window": window, "--config": file,
                "--db": db}  # fmt: skip
    of_file = {"--demand": demand, "--expect-rps": expect_rps}
    for option, given in (of_file if curve is None else of_store).items():
        if given is not None and curve is None:
            raise UsageError(f"{option} goes with --curve: the store knows what was observed")
        if given is not None:
            raise UsageError(f"{option} asks the store, --curve judges a file: give one of them")
    if curve is None:
        _assess_store(server, service, window, slo, expect_concurrency, form, file, db)
    else:
        _assess_curve(curve, demand, slo, expect_concurrency, expect_rps, form)


def _assess_store(
    server: str | None,
    service: str | None,
    window: str | None,
    slo: str | None,
    expect_concurrency: float | None,
    form: str,
    file: str | None,
    db: Path | None,
) -> None:
    import time

    from agent.assess import assess_each
    from agent.config import Config, load
    from agent.forms import sheet
    from agent.recall import Recall
    from agent.sizing.curve import parse_slo
    from agent.when import parse_span_s, utc

    config = load(file) if file else Config()
    with Recall(db or config.agent.db) as recall, recall.snapshot():
        found = assess_each(
            recall,
            config,
            open_minutes=recall.open_minutes(),
            server=server,
            service=service,
            window_s=parse_span_s(window, "--window") if window else None,
            slo=parse_slo(slo) if slo else None,
            expect_concurrency=expect_concurrency,
            now_s=time.time(),
        )
    sheets = [
        sheet(f"{one.scope}, {utc(one.at_unix_s)}", one.verdict, one.pattern) for one in found
    ]
    if form == "json":
        answers = [one.as_json() for one in found]
        _print_json(answers[0] if len(answers) == 1 else answers)
    else:
        _print_sheets(sheets, form)


def _assess_curve(
    curve: str,
    demand: str | None,
    slo: str | None,
    expect_concurrency: float | None,
    expect_rps: float | None,
    form: str,
) -> None:
    from agent.files import judge_files, read_demand
    from agent.forms import sheet
    from agent.model import UsageError
    from agent.sizing.curve import parse_slo

    if demand is not None and (expect_concurrency or expect_rps):
        raise UsageError("--demand and --expect-… both declare the demand: give one of them")
    try:
        sweep = _read_sweep(curve)
    except UsageError as error:
        raise UsageError(f"--curve {curve}: {error}") from error
    try:
        data = _bytes(demand) if demand is not None else None
    except UsageError as error:
        raise UsageError(f"--demand {demand}: {error}") from error
    verdict = judge_files(
        sweep,
        parse_slo(slo) if slo else sweep.slo,
        read_demand(data, str(demand)) if data is not None else None,
        expect_concurrency=expect_concurrency,
        expect_rps=expect_rps,
    )
    if form == "json":
        _print_json(verdict)
    else:
        _print_sheets([sheet(sweep.target.model or curve, verdict)], form)


def _print_json(value: object) -> None:
    from agent.model import encode

    click.echo(encode(value).decode())


def _print_sheets(sheets: Sequence[Sheet], form: str) -> None:
    from agent import forms

    if form == "text":
        click.echo("\n\n".join("\n".join(forms.text(one)) for one in sheets))
    else:
        click.echo({"markdown": forms.markdown, "html": forms.html}[form](sheets), nl=False)


_AT_LEAST_ONE = click.IntRange(min=1)


@cli.command()
@click.option("--gpu", "card", required=True, metavar="NAME", help="Such as h100-sxm, l40s, 4090.")
@click.option(
    "--gpus",
    type=_AT_LEAST_ONE,
    metavar="N",
    help="So many in all.  [default: --tp times --replicas, or 1]",
)
@click.option(
    "--model",
    "shape",
    required=True,
    metavar="NAME|config.json",
    help="Short name, Hugging Face id, or a Hugging Face config.json.",
)
@click.option(
    "--precision",
    metavar="P",
    help="Of the weights: bf16, fp16, fp8, int8, int4, fp4, mxfp4.  "
    "[default: what the model's name or config.json tells, else bf16]",
)
@click.option(
    "--kv-precision",
    default="bf16",
    show_default=True,
    metavar="P",
    help="Of the KV cache: bf16, fp16, fp8.",
)
@click.option(
    "--input-tokens", type=_AT_LEAST_ONE, required=True, metavar="N", help="Of a request's prompt."
)
@click.option(
    "--output-tokens", type=_AT_LEAST_ONE, required=True, metavar="N", help="Of its answer."
)
@click.option(
    "--concurrency", required=True, metavar="N,…", help="Requests at once, such as 1,8,64."
)
@click.option(
    "--tp",
    type=_AT_LEAST_ONE,
    metavar="N",
    help="GPUs an engine is split over.  [default: all of a replica's]",
)
@click.option(
    "--replicas", type=_AT_LEAST_ONE, metavar="N", help="Engines alike.  [default: 1, or gpus / tp]"
)
@click.option(
    "--engine",
    default="vllm",
    show_default=True,
    metavar="NAME",
    help="vllm, sglang or tensorrt-llm.",
)
@click.option(
    "--max-num-seqs",
    type=_AT_LEAST_ONE,
    metavar="N",
    help="Requests an engine takes into its batch.  [default: the engine's own]",
)
@click.option(
    "--calibrate",
    metavar="SWEEP.json",
    help="A measured sweep, as loadgen --json writes it: figures start from it.",
)
@click.option(
    "--measured-gpu", metavar="NAME", help="What GPU that was on, where it does not tell."
)
@click.option("--measured-tp", type=_AT_LEAST_ONE, metavar="N", help="Likewise, how many.")
@click.option("--measured-precision", metavar="P", help="Likewise, its weights' precision.")
@click.option("--gpus-file", metavar="FILE", help="GPUs of your own, see config/gpus.example.csv.")
@click.option("--json", "file", metavar="FILE|-", help="For programs.")
def predict(
    card: str,
    gpus: int | None,
    shape: str,
    precision: str | None,
    kv_precision: str,
    input_tokens: int,
    output_tokens: int,
    concurrency: str,
    tp: int | None,
    replicas: int | None,
    engine: str,
    max_num_seqs: int | None,
    calibrate: str | None,
    measured_gpu: str | None,
    measured_tp: int | None,
    measured_precision: str | None,
    gpus_file: str | None,
    file: str | None,
) -> None:
    """Say what hardware that is not there would do, with an interval.

    From what such GPUs reach in published benchmarks, or from a sweep of yours. A figure that
    cannot be given (the weights do not fit, the sweep is of another vendor's GPU) is refused with
    the reason, which is an answer: exit code 0.

    \b
    agent predict --gpu h100-sxm --model llama-3.1-8b --input-tokens 1000 --output-tokens 300 \\
      --concurrency 1,8,64
    """
    from agent.model import UsageError, encode
    from agent.sizing import hardware
    from agent.sizing import predict as sizing
    from agent.sizing.engine import EngineSpec

    try:
        own = hardware.read_gpus(_bytes(gpus_file).decode()) if gpus_file else {}
    except (UsageError, UnicodeDecodeError) as error:
        raise UsageError(f"--gpus-file {gpus_file}: {error}") from error
    levels = _numbers(concurrency, "--concurrency")
    device = hardware.gpu(card, own)
    described, told = _model_shape(shape)
    seats = max_num_seqs or sizing.usual_seats(engine, device)
    spec = EngineSpec(
        gpu=device,
        model=described,
        precision=hardware.precision(precision or told or "bf16"),
        kv_precision=hardware.precision(kv_precision),
        max_num_seqs=seats,
        max_num_batched_tokens=max(8192, seats),
    )
    deployed = sizing.deployment(spec, gpus, tp=tp, replicas=replicas, engine=engine)
    sweep = measured = None
    if calibrate is not None:
        try:
            sweep = _read_sweep(calibrate)
            measured = sizing.measured_spec(
                sweep,
                deployed.spec,
                card=hardware.gpu(measured_gpu, own) if measured_gpu else None,
                tp=measured_tp,
                precision=hardware.precision(measured_precision) if measured_precision else None,
                own=own,
            )
        except UsageError as error:
            raise UsageError(f"--calibrate {calibrate}: {error}") from error
    elif measured_gpu or measured_tp or measured_precision:
        raise UsageError("--measured-… says what a sweep was measured on: give it with --calibrate")
    found = sizing.answer(deployed, levels, input_tokens, output_tokens, sweep, measured)
    if file is None:
        for line in sizing.lines(found):
            click.echo(line)
    elif file == "-":
        click.echo(encode(found).decode())
    else:
        _write(file, encode(found))


def _model_shape(name: str) -> tuple[ModelShape, str | None]:
    """A built-in model, or what a config.json (or its directory) describes, and the precision that
    this tells. Raises UsageError."""
    import msgspec

    from agent.model import UsageError
    from agent.sizing.models import from_config, model, precision_in, precision_of

    path = Path(name)
    if path.suffix != ".json" and not path.is_dir():
        return model(name), precision_in(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = msgspec.json.decode(_bytes(str(path)), type=dict[str, Any])
        return from_config(config, name=path.resolve().parent.name), precision_of(config)
    except (ValueError, RecursionError, UsageError) as error:
        raise UsageError(f"--model {path}: {error}") from error


def _numbers(text: str, option: str) -> list[float]:
    """`1,8,64` as numbers above 0. Raises UsageError."""
    from agent.model import UsageError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < one < math.inf for one in found):
        raise UsageError(f"{option} {text}: write numbers above 0, such as 1,8,64")
    return [int(one) if one.is_integer() else one for one in found]


def _write(file: str, data: bytes) -> None:
    from agent.model import UsageError

    try:
        Path(file).write_bytes(data + b"\n")
    except OSError as error:
        raise UsageError(f"--json {file}: {error.strerror}") from error


@cli.command()
@click.option("--config", "file", metavar="FILE", help="The agent's configuration.")
@click.option("--url", "urls", multiple=True, metavar="URL", help="A server; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(file: str | None, urls: tuple[str, ...], as_json: bool) -> int:
    """Say what would stop a good measurement here, and what mends it.

    Looks at the GPUs, the servers (those of the configuration and --url, else the usual ports of
    this machine), the store, the clock and the machine. Ends with 1 where something is to mend.
    """
    import asyncio

    from agent import doctor as judge
    from agent.config import Config, load, server_url
    from agent.facts import gather
    from agent.model import encode

    config = load(file) if file else Config()
    asked = [server_url(url, "--url") for url in urls]
    checks = judge.examine(asyncio.run(gather(config, file or "", asked)))
    if as_json:
        click.echo(encode({"checks": checks, "to_mend": judge.to_mend(checks)}).decode())
    else:
        for line in judge.lines(checks):
            click.echo(line)
    return judge.exit_code(checks)


@cli.command()
@click.option("--config", "file", metavar="FILE", help="The agent's configuration.")
@click.option("--url", "urls", multiple=True, metavar="URL", help="A server; may be repeated.")
def run(file: str | None, urls: tuple[str, ...]) -> None:
    """Stay beside production: sample, keep, export, judge, until it is stopped.

    Without --config and --url it observes the servers that answer on this machine's usual ports.
    SIGHUP reads the configuration again, SIGTERM ends the agent. What happens is said
    on stderr, a line each.
    """
    from agent import startup

    startup.run(file, urls)


@cli.command()
@click.option(
    "--url",
    default="http://127.0.0.1:9477",
    show_default=True,
    metavar="URL",
    help="The agent's address.",
)
@click.option("--token-file", metavar="FILE", help="The agent's token, where it asks for one.")
@click.option("--once", is_flag=True, help="One snapshot, as where the output is no terminal.")
@click.option("--interval", default="2s", show_default=True, metavar="TIME", help="Between looks.")
def top(url: str, token_file: str | None, once: bool, interval: str) -> int:
    """A running agent, live: its servers, its GPUs, and what is not well. Ctrl-C ends it."""
    from rich.console import Console

    from agent.config import read_token, server_url
    from agent.model import UsageError
    from agent.top import Agent, follow, show_once
    from agent.when import parse_span_s

    interval_s = parse_span_s(interval, "--interval")
    if not 1 <= interval_s <= 3600:
        raise UsageError(f"--interval {interval!r}: write a time from 1s to 1h")
    token = read_token(Path(token_file)) if token_file else None
    agent, console = Agent(server_url(url, "--url"), token), Console(highlight=False)
    try:
        if once or not sys.stdout.isatty() or console.is_dumb_terminal:
            show_once(agent, console)
        else:
            follow(agent, console, interval_s)
    except KeyboardInterrupt:
        return 130
    return 0


@cli.group()
def config() -> None:
    """What the agent's configuration says."""


@config.command()
@click.argument("file")
def check(file: str) -> None:
    """Validate FILE and print what it comes to, defaults included and secrets hidden."""
    from agent.config import load, render

    checked = load(file)
    click.echo(f"# {file} as it takes effect. Secrets stand in their files and are not shown.")
    click.echo(render(checked), nl=False)


@cli.command()
@click.argument("metric")
@click.option("--last", metavar="TIME", help="The window up to the newest sample.  [default: 1h]")
@click.option("--from", "begin", metavar="INSTANT", help="ISO 8601 or unix seconds.")
@click.option("--to", "end", metavar="INSTANT", help="Likewise.  [default: the newest sample]")
@click.option("--step", metavar="TIME", help="Time a point stands for.  [default: 1/300 of all]")
@click.option("--server", metavar="NAME", help="Of this server alone.  [default: all together]")
@click.option("--service", metavar="NAME", help="Of all servers of this service.")
@click.option("--gpu", metavar="UUID", help="Of this GPU alone.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="For people or for programs.",
)
@_DB
def query(
    metric: str,
    last: str | None,
    begin: str | None,
    end: str | None,
    step: str | None,
    server: str | None,
    service: str | None,
    gpu: str | None,
    form: str,
    db: Path | None,
) -> None:
    """A series from the store, while the agent writes or without it.

    \b
    agent query output_tokens_per_s --last 24h
    agent query kv_usage_ratio --server chat --last 30d --step 1h --format csv
    """
    import time

    from agent.model import UsageError
    from agent.recall import Recall
    from agent.when import parse_instant_s, parse_span_s

    if last is not None and begin is not None:
        raise UsageError("--last and --from both say where the window begins: give one")
    span_s = parse_span_s(last or "1h", "--last")
    step_s = parse_span_s(step, "--step") if step is not None else None
    with Recall(db) as recall:
        to_s = parse_instant_s(end, "--to") if end else recall.newest_unix_s(time.time())
        if to_s is None:
            raise UsageError(f"{recall.path} holds no sample yet: is the agent running?")
        from_s = parse_instant_s(begin, "--from") if begin else max(0.0, to_s - span_s)
        series = recall.series(
            metric, from_s, to_s, step_s, server=server, service=service, gpu=gpu
        )
    _print_series(series, form)


def _print_series(series: Series, form: str) -> None:
    from agent.model import encode
    from agent.when import utc
    from agent.words import printable

    if form == "json":
        click.echo(encode(series).decode())
        return
    if form == "csv":
        click.echo(f"unix_s,{series.metric}")
        for at, value in series.points:
            click.echo(f"{at:.0f},{value!r}")
        return
    click.echo(printable(f"{series.metric}, {series.unit}"))
    for at, value in series.points:
        click.echo(f"{utc(at)}  {value:>14,.6g}")
    if not series.points:
        click.echo("no samples in this window")


@cli.command("import")
@click.argument("file", metavar="SWEEP.json")
@click.option("--server", metavar="NAME", help="The server, as the agent names it.")
@_DB
def import_(file: str, server: str | None, db: Path | None) -> None:
    """Bring a measured curve into the store, from the file that loadgen --json wrote.

    The same run again replaces what was kept of it.
    """
    from agent.history import import_curve
    from agent.model import UsageError
    from agent.words import printable

    try:
        sweep = _read_sweep(file)
        number = import_curve(db, sweep, server)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    of = f" of {sweep.target.model}" if sweep.target.model else ""
    click.echo(printable(f"curve {number}{of}: {len(sweep.levels)} levels"))


def _read_sweep(file: str) -> Sweep:
    """A sweep from a file, or `-` for standard input. Raises UsageError."""
    from agent.swept import read_sweep

    return read_sweep(_bytes(file))


def _bytes(file: str) -> bytes:
    from agent.model import UsageError

    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UsageError(str(error.strerror)) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: every failure of ours is one line on stderr and an exit code."""
    sys.exit(guarded("agent", lambda: cli.main(argv, prog_name="agent", standalone_mode=False)))


if __name__ == "__main__":
    main()
