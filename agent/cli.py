"""`agent`: parse, wire, exit code. Everything heavy is imported where it is used."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from agent import __version__
from agent.failures import guarded

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="agent")
def cli() -> None:
    """Judges whether inference hardware fits its load.

    \b
    loadgen sweep http://127.0.0.1:8000 --json sweep.json
    agent assess --curve sweep.json --expect-concurrency 24
    """


@cli.command()
@click.option(
    "--curve",
    required=True,
    metavar="SWEEP.json",
    help="A measured curve: what loadgen --json writes, or another tool's in that form.",
)
@click.option(
    "--slo",
    metavar="RULES",
    help="Such as 'ttft:p95<500ms,itl:p95<50ms'.  [default: the sweep's own]",
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
    help="Judge against this many requests a second.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="For people or for programs.",
)
def assess(
    curve: str,
    slo: str | None,
    expect_concurrency: float | None,
    expect_rps: float | None,
    form: str,
) -> None:
    """Judge a measured curve, against an expected load where one is given."""
    from agent.model import UsageError, decode_sweep, encode
    from agent.sizing.curve import analyse, parse_slo
    from agent.sizing.judge import judge
    from agent.words import printable, verdict_lines

    for option, demand in (
        ("--expect-concurrency", expect_concurrency),
        ("--expect-rps", expect_rps),
    ):
        if demand is not None and not math.isfinite(demand):
            raise UsageError(f"{option} {demand}: write a finite number above 0")
    try:
        sweep = decode_sweep(sys.stdin.buffer.read() if curve == "-" else Path(curve).read_bytes())
    except OSError as error:
        raise UsageError(f"--curve {curve}: {error.strerror}") from error
    except UsageError as error:
        raise UsageError(f"--curve {curve}: {error}") from error
    targets = parse_slo(slo) if slo else sweep.slo
    verdict = judge(
        sweep.levels,
        analyse(sweep.levels, targets),
        targets,
        expect_concurrency=expect_concurrency,
        expect_rps=expect_rps,
        simulated=sweep.run.simulated,
        target=sweep.target.url,
    )
    if form == "json":
        click.echo(encode(verdict).decode())
    else:
        for line in verdict_lines(verdict):
            click.echo(printable(line))


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


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: every failure of ours is one line on stderr and an exit code."""
    sys.exit(guarded("agent", lambda: cli.main(argv, prog_name="agent", standalone_mode=False)))


if __name__ == "__main__":
    main()
