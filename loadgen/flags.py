"""The flags of `sweep` and `run`: each may stand in the environment and in a TOML file, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

ENDPOINTS = ("chat", "completions", "responses", "embeddings", "rerank")


class _HeaderLine(click.types.StringParamType):
    """In LOADGEN_HEADER one a line: a header has a space in it."""

    envvar_list_splitter = "\n"


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
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
    option("--model", help="Model to ask for.  [default: the first of /v1/models]"),
    option("--endpoint", type=click.Choice(ENDPOINTS), default="chat",
            show_default=True, help="API to drive."),
    option("--stream/--no-stream", default=True, show_default=True,
            help="Stream the replies; without, there is no TTFT and no ITL."),
    option("--arrival", default="poisson", show_default=True,
            help="Arrivals of the open loop: poisson, constant or gamma:CV."),
    option("--input-tokens", metavar="LENGTH",
            help="Prompt: N, normal:M:SD, lognormal:M:SD, uniform:A:B.  [default: 512]"),
    option("--output-tokens", metavar="LENGTH",
            help="Reply, likewise.  [default: 128, or as recorded]"),
    option("--prefix-tokens", type=click.IntRange(0), default=0, metavar="N",
            help="Shared tokens in front of every prompt's own."),
    option("--prefixes", type=click.IntRange(1), default=1, metavar="K",
            help="So many different ones of them."),
    option("--dataset", metavar="FILE", help="Prompts from a ShareGPT JSON or plain JSONL file."),
    option("--trace", metavar="FILE",
            help="Lengths and instants as recorded: Azure or BurstGPT CSV, Mooncake JSONL."),
    option("--speedup", metavar="X,X,…", help="So many times as fast as recorded, a level each."),
    option("--workload-from", metavar="URL|FILE",
            help="Lengths and rate as an agent observed them."),
    option("--turns", type=click.IntRange(1), default=1, metavar="N",
            help="Conversations of N turns, each with its history."),
    option("--think-time", metavar="TIME", help="Between a reply and the next turn."),
    option("--mix", metavar="MODEL=WEIGHT,…", help="Several models or LoRA names at once."),
    option("--tokenizer", metavar="PATH",
            help="A tokenizer.json, where the server does not count prompts (extra)."),
    option("--reuse-prompts", is_flag=True,
            help="One prompt for all requests: a prefix cache may answer."),
    option("--requests", type=click.IntRange(1), metavar="N",
            help="Requests per level.  [default: 5 a stream, at least 20]"),
    option("--duration", metavar="TIME",
            help="Time per level instead.  [open loop default: 30s]"),
    option("--warmup", default="0", show_default=True, metavar="N|TIME",
            help="Requests, or time, before each level's measurement."),
    option("--repeats", type=click.IntRange(1), default=1, show_default=True, metavar="N",
            help="Run the whole list of levels N times."),
    option("--budget", metavar="TIME",
            help="Limit for all levels together.  [default with auto: 5m]"),
    option("--slo", metavar="RULES", help="Such as 'ttft:p95<500ms,itl:p95<50ms,e2e:p99<30s'."),
    option("--timeout", default="300s", show_default=True, metavar="TIME",
            help="Limit for one request."),
    option("--api-key-file", metavar="FILE", help="Key to send; else OPENAI_API_KEY."),
    option("--header", multiple=True, type=_HeaderLine(), metavar="'NAME: VALUE'",
            help="Further header; repeatable."),
    option("--ca-file", metavar="FILE", help="CA certificates to trust."),
    option("--insecure", is_flag=True, help="Do not verify the server's certificate."),
    option("--metrics-url", metavar="URL|none",
            help="The server's metrics page.  [default: found on the target]"),
    option("--agent", metavar="URL",
            help="A remote agent: GPU and server series from it, the curve to it."),
    option("--agent-token-file", metavar="FILE",
            help="Its token; else SERVEFIT_AGENT_TOKEN."),
    option("--processes", default="auto", show_default=True, metavar="N|auto",
            help="Load-generating processes that share a level."),
    option("--seed", type=int, default=0, show_default=True, metavar="N",
            help="Seed of lengths and arrivals."),
    option("--expect-concurrency", type=click.FloatRange(0, min_open=True), metavar="N",
            help="Judge against this many requests at once."),
    option("--expect-rps", type=click.FloatRange(0, min_open=True), metavar="X",
            help="Judge against this many requests a second."),
    option("--prices", metavar="FILE",
            help="What GPUs cost, as config/prices.toml.  [default: indicative list prices]"),
    option("--fail-on", metavar="RULE",
            help="Exit 1 on: slo, invalid, or a finding such as UNDER_SIZED; several by commas."),
    option("--db", metavar="FILE", help="Database.  [default: in your data directory]"),
    option("--json", "json_file", metavar="FILE|-", help="Write the result as JSON."),
    option("--html", "html_file", metavar="FILE", help="Write the report, one HTML file."),
    option("--csv", "csv_file", metavar="FILE|-", help="Write the levels as CSV."),
    option("--otlp-endpoint", metavar="URL", help="Send a span per request there, OTLP/HTTP."),
    option("--yes", is_flag=True, help="Go on although the server is busy with others."),
    option("--quiet", is_flag=True, help="No progress and no table."),
    option("--no-progress", is_flag=True, help="Plain lines instead of a live display."),
]  # fmt: skip


def load_options(function: Any) -> Any:
    for one in reversed(_LOAD_OPTIONS):
        function = one(function)
    return function
