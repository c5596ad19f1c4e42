"""Every option that can be wrong, and that whatever is typed ends as a value or a UsageError."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Curve, UsageError
from agent.sizing.curve import parse_slo
from agent.sizing.judge import judge
from agent.terms import FINDINGS
from loadgen import config
from loadgen.arrival import stages
from loadgen.client import parse_url
from loadgen.config import Options, check
from loadgen.lengths import Fixed

BASE = Options(url="http://localhost", concurrency=(1,))


def with_(**changes: Any) -> Options:
    return msgspec.structs.replace(BASE, **changes)


# --------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("30s", 30), ("500ms", 0.5), ("2m", 120), ("2min", 120), ("1h", 3600),
     (" .5 s ", 0.5)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert config.parse_duration(text, "--duration") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "0", "-1s", "1d", "1s2", "1e3", "nan", "inf", "9" * 400])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--timeout"):
        config.parse_duration(text, "--timeout")


def test_lists_of_levels() -> None:
    assert config.parse_concurrency(" 1, 8 ,4") == (1, 8, 4)
    assert config.parse_rates("0.5,1e1") == (0.5, 10.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty place"), ("1,", "empty place"), ("0", "from 1"), ("-1", "from 1"),
        ("1.5", "whole"), ("²", "whole"), ("x", "whole"), ("9" * 5000, "whole"), ("1,1", "twice"),
    ],
)  # fmt: skip
def test_concurrency_that_is_none(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        config.parse_concurrency(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "x", "1,,2", "1,1.0", "1e9"])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--rate"):
        config.parse_rates(text)


def test_loads_that_are_searched() -> None:
    assert config.parse_loads("auto", None) == ((), (), None, "concurrency")
    assert config.parse_loads(None, " Auto ") == ((), (), None, "rate")
    assert config.parse_loads("1,2", None) == ((1, 2), (), None, None)
    assert config.parse_loads(None, "0.5") == ((), (0.5,), None, None)
    assert config.parse_loads(None, "3s@1,2s@1-4") == ((), (), stages("3s@1,2s@1-4"), None)
    searched = check(with_(concurrency=(), auto="rate"))
    assert searched.mode == "rate"
    assert searched.plan_at(2.5).rate_rps == 2.5
    assert with_(auto="concurrency", requests=7).plan_at(3).requests == 7


def test_warmup() -> None:
    assert config.parse_warmup("20") == (20, 0.0)
    assert config.parse_warmup("0") == (0, 0.0)
    assert config.parse_warmup("10s") == (0, 10.0)
    for text in ("", "x", "-1", "0s"):
        with pytest.raises(UsageError, match="--warmup"):
            config.parse_warmup(text)


def test_headers() -> None:
    assert config.parse_headers(["A: b:c ", "X-Y:"]) == {"A": "b:c", "X-Y": ""}


@pytest.mark.parametrize(
    "line", ["", "secret", ": secret", "a b: secret", "A: secret\r\nB: x", "A: \x00secret",
             "A: secret\udcff", "Host: secret", "content-length: 5secret"],
)  # fmt: skip
def test_headers_that_are_none_keep_their_secret(line: str) -> None:
    with pytest.raises(UsageError, match="--header") as caught:
        config.parse_headers([line])
    assert "secret" not in str(caught.value).replace("begins 'secret'", "")


@pytest.mark.parametrize(
    ("text", "base", "name"),
    [
        ("http://h:9477", "http://h:9477", None),
        ("https://h/agent/", "https://h/agent", None),
        ("http://[::1]:9477/?server=a%20b", "http://[::1]:9477", "a b"),
    ],
)
def test_an_agents_address(text: str, base: str, name: str | None) -> None:
    assert config.parse_agent(text) == (base, name)


@pytest.mark.parametrize(
    "text", ["", "h:9477", "http://", "http://[", "http://h:0", "http://h:x", "ftp://h", "http://h#a",
             "http://h?server=", "http://h?server=a&server=b", "http://h?service=a", "http://h?a"],
)  # fmt: skip
def test_an_agents_address_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--agent .* is no address: http://HOST:9477, with"):
        config.parse_agent(text)


def test_an_agents_address_with_a_password_is_not_repeated() -> None:
    for text in ("http://u:secret@h:9477", "u:secret@h"):
        with pytest.raises(UsageError, match="use --agent-token-file") as caught:
            config.parse_agent(text)
        assert "secret" not in str(caught.value)


def test_the_agents_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVEFIT_AGENT_TOKEN", raising=False)
    assert config.agent_token(None) is None
    monkeypatch.setenv("SERVEFIT_AGENT_TOKEN", "of the world")
    with pytest.raises(UsageError, match="SERVEFIT_AGENT_TOKEN: it must hold the token and"):
        config.agent_token(None)
    file = tmp_path / "token"
    file.write_text("t-1\n")
    assert config.agent_token(str(file)) == "t-1"
    with pytest.raises(UsageError, match="--agent-token-file"):
        config.agent_token(str(tmp_path / "none"))


def test_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert config.api_key(None) is None
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")
    assert config.api_key(None) == "sk-1"
    monkeypatch.setenv("OPENAI_API_KEY", "sk\r\n1")
    with pytest.raises(UsageError, match="OPENAI_API_KEY: it must hold the key") as caught:
        config.api_key(None)
    assert "sk" not in str(caught.value)
    file = tmp_path / "key"
    file.write_text("  sk-2 \n")
    assert config.api_key(str(file)) == "sk-2"  # the file comes first
    for content in (b"", b"two words", b"line\nline", b"\xff\xfe", "ключ".encode()):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="--api-key-file"):
            config.api_key(str(file))
    with pytest.raises(UsageError, match="No such file"):
        config.api_key(str(tmp_path / "none"))


def test_gates() -> None:
    assert config.parse_fail_on(None) == ()
    assert config.parse_fail_on("SLO, under_sized,invalid") == ("slo", "UNDER_SIZED", "invalid")
    with pytest.raises(UsageError, match="nearest is 'under_sized'"):
        config.parse_fail_on("undersized")
    with pytest.raises(UsageError, match="empty place"):
        config.parse_fail_on("slo,")


def test_every_finding_of_the_judge_can_be_a_gate() -> None:
    assert judge([], Curve(), []).finding in FINDINGS


PARSERS: dict[str, Callable[[str], object]] = {
    "duration": lambda text: config.parse_duration(text, "--duration"),
    "concurrency": config.parse_concurrency,
    "rates": config.parse_rates,
    "warmup": config.parse_warmup,
    "header": lambda text: config.parse_headers([text]),
    "fail_on": config.parse_fail_on,
    "slo": parse_slo,
    "url": parse_url,
    "metrics_url": lambda text: check(with_(metrics_url=text)),
    "arrival": lambda text: check(with_(arrival=text)),
    "ca_file": lambda text: check(with_(ca_file=text)),
}
# Besides any text at all, text that looks like an option.
TEXTS = st.text() | st.text(alphabet="0123456789.,:<%smhepinf-+ ²[]/@é\x00\udcff", max_size=30)


@pytest.mark.parametrize("parser", PARSERS)
@given(text=TEXTS)
def test_any_text_is_a_value_or_a_usage_error(parser: str, text: str) -> None:
    with suppress(UsageError):
        PARSERS[parser](text)


# ------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rates_rps": (1.0,)}, "--concurrency and --rate together"),
        ({"concurrency": ()}, "no level asked for"),
        ({"requests": 10, "duration_s": 1.0}, "--requests and --duration together"),
        ({"arrival": "burst"}, "--arrival 'burst'"),
        ({"concurrency": (), "auto": "rate", "repeats": 2}, "--repeats with --rate auto"),
        ({"budget_s": 4.0}, "--budget: write at least"),
        ({"concurrency": (4, 8), "requests": 5}, "fewer than the 8 streams"),
        ({"stream": False, "slo": tuple(parse_slo("itl:p95<50ms"))}, "--no-stream"),
        ({"expect_rps": float("nan")}, "--expect-rps"),
        ({"expect_concurrency": float("inf")}, "--expect-concurrency"),
        ({"ca_file": "/nowhere/ca.pem"}, "--ca-file /nowhere/ca.pem: no such file"),
        ({"metrics_url": "localhost:8000/metrics"}, "--metrics-url"),
        ({"metrics_url": "http://"}, "--metrics-url"),
        ({"metrics_url": "http://[::1"}, "--metrics-url"),
    ],
)
def test_what_contradicts_itself(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check(with_(**changes))


def test_what_does_not() -> None:
    for options in (
        BASE,
        with_(concurrency=(), rates_rps=(1.0,), arrival="constant"),
        with_(concurrency=(), rates_rps=(1.0,), arrival="gamma:2.5"),
        with_(metrics_url="none"),
        with_(metrics_url="https://h/metrics"),
        with_(stream=False, slo=tuple(parse_slo("e2e:p95<5s"))),
    ):
        assert check(options) is options


def test_plans_are_the_list_as_often_as_asked() -> None:
    plans = with_(concurrency=(1, 8), repeats=3).plans()
    assert [plan.concurrency for plan in plans] == [1, 8, 1, 8, 1, 8]
    assert [plan.requests for plan in plans[:2]] == [20, 40]
    rates = with_(concurrency=(), rates_rps=(2.0, 0.5), repeats=2).plans()
    assert [plan.rate_rps for plan in rates] == [2.0, 0.5, 2.0, 0.5]
    assert {plan.duration_s for plan in rates} == {config.DEFAULT_OPEN_LOOP_S}
    assert {plan.mode for plan in rates} == {"rate"}
    [one] = with_(duration_s=7.0, warmup_requests=3, timeout_s=9.0).plans()
    assert (one.duration_s, one.requests, one.warmup_requests, one.timeout_s) == (7.0, None, 3, 9.0)


def test_files_to_write(tmp_path: Path) -> None:
    config.check_writable(None, "--json")
    config.check_writable("-", "--json")
    config.check_writable(str(tmp_path / "new"), "--json")
    with pytest.raises(UsageError, match="this is a directory"):
        config.check_writable(str(tmp_path), "--json")
    with pytest.raises(UsageError, match="there is no directory"):
        config.check_writable(str(tmp_path / "a" / "b"), "--json")


@pytest.mark.parametrize("endpoint", ["embeddings", "rerank"])
def test_where_nothing_is_generated_nothing_is_streamed_or_asked_for(endpoint: str) -> None:
    options = check(with_(endpoint=endpoint))
    assert (options.stream, options.output_tokens) == (False, Fixed(0))
    assert options.plans()[0].endpoint == endpoint
    check(with_(endpoint=endpoint, slo=tuple(parse_slo("e2e:p95<1s"))))
    with pytest.raises(UsageError, match=f"--endpoint {endpoint} gives no TTFT or ITL"):
        check(with_(endpoint=endpoint, slo=tuple(parse_slo("ttft:p95<1s"))))
