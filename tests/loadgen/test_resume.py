"""A run taken up again: its options as they were, no secret among what is kept."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agent.model import Confidence, Level, Run, StoreError, Sweep, UsageError, Verdict
from agent.sizing.curve import parse_slo
from agent.store import Kept, State
from loadgen.config import Options
from loadgen.resume import FIELDS, FREE, SECRET, stored, take_up

OPTIONS = Options(
    url="http://h:1",
    concurrency=(1, 2, 4),
    slo=tuple(parse_slo("ttft:p95<1s")),
    warmup_s=2.0,
    headers={"Authorization": "Bearer sk-secret", "X-Team": "hidden"},
    otlp_endpoint="http://user:hidden@h:2",
    yes=True,
)
HEADERS = {"authorization": "Bearer sk-other", "X-Team": "b"}


def kept(state: State | None = "running", options: str | None = None) -> Kept:
    done = (
        Verdict("CAPACITY_ONLY", "s", Confidence("low", "x")) if state in ("done", "cut") else None
    )
    run = Run(id="r1", interrupted=state == "cut")
    levels = [Level(concurrency=1), Level(concurrency=2)]
    return Kept(Sweep(run, levels=levels, verdict=done), options or stored(OPTIONS), state)


def asked(**changes: Any) -> Options:
    return msgspec.structs.replace(Options(url=""), headers=HEADERS, **changes)


def test_no_secret_is_kept() -> None:
    text = stored(OPTIONS)
    for secret in ("sk-secret", "hidden"):
        assert secret not in text
    assert '"Authorization"' in text  # its name is


def test_options_are_those_of_the_run_with_the_headers_of_now() -> None:
    options, begun = take_up(kept(), asked(yes=True), set())
    expected = msgspec.structs.replace(OPTIONS, headers=HEADERS, otlp_endpoint=None, yes=False)
    assert options == expected
    assert [level.concurrency for level in begun.levels] == [1, 2]


def test_what_is_said_again_must_be_the_same() -> None:
    same = asked(url="http://h:1", concurrency=(1, 2, 4), warmup_s=2.0)
    take_up(kept(), same, {"url", "concurrency", "warmup"})
    for name, changes, said in (
        ("url", {"url": "http://other"}, "the URL is not what"),
        ("concurrency", {"concurrency": (1, 2)}, "--concurrency is not what"),
        ("rate", {"auto": "rate"}, "--rate is not what"),
        ("warmup", {"warmup_requests": 5}, "--warmup is not what"),
        ("input_tokens", {"input_tokens": 7}, "--input-tokens is not what"),
        ("budget", {"budget_s": 7.0}, "--budget is not what"),
    ):
        with pytest.raises(UsageError, match=f"--resume r1: {said}"):
            take_up(kept(), asked(**changes), {name})


def test_what_changes_no_measurement_may_be_new() -> None:
    again = asked(yes=True, otlp_endpoint="http://h:3")
    options, _ = take_up(kept(), again, {"yes", "otlp_endpoint", "json_file", "header"})
    assert (options.yes, options.otlp_endpoint) == (True, "http://h:3")


def test_a_missing_header_is_named_and_its_value_not() -> None:
    with pytest.raises(UsageError, match=r"the header Authorization.*by OPENAI_API_KEY") as caught:
        take_up(kept(), Options(url=""), set())
    assert "sk-" not in str(caught.value)
    some = msgspec.structs.replace(asked(), headers={"Authorization": "x"})
    with pytest.raises(UsageError, match=r"the header X-Team.*by --header"):
        take_up(kept(), some, set())


def test_a_level_that_was_cut_short_is_measured_again() -> None:
    _, begun = take_up(kept("cut"), asked(), set())
    assert [level.concurrency for level in begun.levels] == [1]
    assert (begun.verdict, begun.run.interrupted) == (None, False)


def test_a_finished_run_keeps_its_verdict() -> None:
    _, begun = take_up(kept("done"), asked(), set())
    assert begun.verdict is not None
    assert len(begun.levels) == 2


def test_what_an_older_version_kept_cannot_be_gone_on_with() -> None:
    with pytest.raises(UsageError, match="an older servefit kept this run"):
        take_up(Kept(Sweep(Run(id="r1")), None, None), asked(), set())
    with pytest.raises(StoreError, match="cannot be read"):
        take_up(kept(options='{"options": 1}'), asked(), set())


def test_every_flag_of_a_sweep_is_compared_or_free() -> None:
    """A new option that is no field of its own name must say which ones it is."""
    from loadgen.cli import sweep

    fields = {field.name for field in msgspec.structs.fields(Options)}
    taken = {"config", "demo", "resume", "fail_on"}
    for parameter in sweep.params:
        name = parameter.name or ""
        if name in FREE | SECRET | taken:
            continue
        assert set(FIELDS.get(name, (name,))) <= fields, name
