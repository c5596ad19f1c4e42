"""What a command line asks for: its flags, the environment and a file, brought into `Options`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from loadgen.config import Options

GENERATING = ("chat", "completions", "responses")  # endpoints that no embedding model has


def asked(context: click.Context, tell: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """What a parsed `sweep` or `run` asks for: the target, found if need be, and the options.

    Raises click.UsageError, and of finding a target UsageError and TargetError.
    """
    given = dict(context.params)
    url, demo = given.pop("url"), given.pop("demo", False)
    nearest(context, given)
    if context.command.name == "run":
        _single(given)
    if demo:
        return _demo(url, given)
    if url is None:
        url = _found(context, given, tell)
    return url, given


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


SOURCES = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)


def nearest(context: click.Context, given: dict[str, Any]) -> None:
    """Of two options that exclude each other, one from further away gives way.

    A flag wins over the environment, and that over a file; both from one place contradict it.
    """
    for pair in (("concurrency", "rate"), ("requests", "duration")):
        if any(given[name] is None for name in pair):
            continue
        sources = [context.get_parameter_source(name) for name in pair]
        ranks = [SOURCES.index(source) for source in sources if source in SOURCES]
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
            agent=given["agent"],
            agent_token_file=given["agent_token_file"],
            seed=given["seed"],
            expect_concurrency=given["expect_concurrency"],
            expect_rps=given["expect_rps"],
            prices=given["prices"],
            fail_on=config.parse_fail_on(given["fail_on"]),
            otlp_endpoint=given["otlp_endpoint"],
            yes=given["yes"],
            command=_command(given.get("added", ())),
        )
    )


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
