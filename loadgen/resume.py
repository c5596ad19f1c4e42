"""A run taken up again: what is kept of its options, and what may be said anew.

Its levels and options come from the store, so that the loads and their order are those of an
undisturbed run. The values of headers are secrets: they are never kept, and have to be given again.
"""

from __future__ import annotations

from collections.abc import Set

import msgspec

from agent.model import Curve, StoreError, Sweep, UsageError
from agent.store import Kept
from loadgen.config import Options

# What changes nothing of what is measured, and may differ from what the run began with.
FREE = {
    "agent", "agent_token_file", "ca_file", "csv_file", "db", "html_file", "insecure", "json_file",
    "no_progress", "otlp_endpoint", "prices", "quiet", "yes",
}  # fmt: skip
SECRET = {"header", "api_key_file"}  # may differ too, and are compared by their names alone
# Flags whose name is not that of their one field.
FIELDS = {
    "concurrency": ("concurrency", "auto"),
    "rate": ("rates_rps", "stages", "auto"),
    "speedup": ("speedups",),
    "think_time": ("think_s",),
    "workload_from": ("input_tokens", "output_tokens"),
    "duration": ("duration_s",),
    "budget": ("budget_s",),
    "warmup": ("warmup_requests", "warmup_s"),
    "timeout": ("timeout_s",),
}


class _Stored(msgspec.Struct):
    options: Options
    headers: list[str]  # their names


def stored(options: Options) -> str:
    """The options as the store keeps them: without the values of headers."""
    plain = msgspec.structs.replace(options, headers={}, otlp_endpoint=None, yes=False)
    return msgspec.json.encode(_Stored(plain, list(options.headers))).decode()


def take_up(kept: Kept, asked: Options, explicit: Set[str]) -> tuple[Options, Sweep]:
    """The options to go on with, and the run as far as it is whole; with a verdict: finished.

    `asked` are options as given now, `explicit` the names of those that somebody really gave.
    Raises UsageError where one of them contradicts the run, or a header of it is missing.
    """
    run_id = kept.sweep.run.id
    if kept.options is None:
        raise UsageError(
            f"--resume {run_id}: an older servefit kept this run, without its options: "
            "start a new sweep"
        )
    try:
        begun = msgspec.json.decode(kept.options, type=_Stored)
    except msgspec.MsgspecError as error:
        raise StoreError(f"--resume {run_id}: its options cannot be read: {error}") from error
    for name in sorted(explicit - FREE - SECRET):
        for field in FIELDS.get(name, (name,)):
            _same(run_id, name, getattr(begun.options, field), getattr(asked, field))
    _have_headers(run_id, begun.headers, asked)
    anew = {name: getattr(asked, name) for name in explicit & FREE if hasattr(asked, name)}
    options = msgspec.structs.replace(begun.options, headers=asked.headers, **anew)
    return options, kept.sweep if kept.state == "done" else _whole(kept)


def _same(run_id: str, name: str, begun: object, asked: object) -> None:
    if begun == asked:
        return
    flag = "the URL" if name == "url" else f"--{name.replace('_', '-')}"
    raise UsageError(
        f"--resume {run_id}: {flag} is not what the run began with: leave it away, or start a "
        "new sweep"
    )


def _have_headers(run_id: str, names: list[str], asked: Options) -> None:
    given = {name.lower() for name in asked.headers}
    for name in names:
        if name.lower() in given:
            continue
        how = "--header"
        if name.lower() == "authorization":
            how = "OPENAI_API_KEY, --api-key-file or --header"
        raise UsageError(
            f"--resume {run_id}: the run sent the header {name}, whose value is not kept: give it "
            f"again, by {how}"
        )


def _whole(kept: Kept) -> Sweep:
    """The run without a level that was cut short, and without the conclusions drawn from it."""
    sweep = kept.sweep
    return msgspec.structs.replace(
        sweep,
        run=msgspec.structs.replace(sweep.run, interrupted=False),
        levels=sweep.levels[:-1] if kept.state == "cut" else sweep.levels,
        curve=Curve(),
        verdict=None,
    )
