"""The server of known timing as a command finds it: compiled once, and without a compiler."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from agent.model import TargetError
from loadgen.targets import truth
from tests.support import require


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(truth.compiler(), "Linux and a C compiler (cc)")
    made = truth.program()
    assert made is not None
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [made]
    monkeypatch.setattr(truth, "compiler", lambda: None)
    assert truth.program() == made
    with truth.serving() as server:
        assert server.kind == "c"


def test_a_changed_source_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(truth.compiler(), "Linux and a C compiler (cc)")
    changed = tmp_path / "truth.c"
    changed.write_bytes(truth.SOURCE.read_bytes() + b"\n")
    before = truth.program()
    monkeypatch.setattr(truth, "SOURCE", changed)
    assert truth.program() != before


def test_a_source_that_does_not_compile_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(truth.compiler(), "Linux and a C compiler (cc)")
    broken = tmp_path / "truth.c"
    broken.write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(truth, "SOURCE", broken)
    assert truth.program() is None
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [broken]


def test_without_a_compiler_it_is_the_python_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "compiler", lambda: None)
    with truth.serving() as server:
        assert server.kind == "python"
    with pytest.raises(TargetError, match="needs Linux and a C compiler"), truth.serving(kind="c"):
        pass


def test_a_compiled_one_that_does_not_run_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older kernel, or a sandbox: it says so and ends."""
    broken = tmp_path / "truth"
    broken.write_text("#!/bin/sh\necho 'truth: epoll_pwait2: not here' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(truth, "program", lambda: broken)
    with truth.serving() as server:
        assert server.kind == "python"


@pytest.mark.parametrize("kind", ["c", "python"])
def test_both_say_the_same_kind_of_things(kind: truth.Kind) -> None:
    if kind == "c":
        require(truth.compiler(), "Linux and a C compiler (cc)")
    with truth.serving(kind=kind, ttft_ms=10, itl_ms=1) as server:
        request = urllib.request.Request(
            server.url + "/v1/chat/completions",
            json.dumps({
                "model": "truth", "messages": [{"role": "user", "content": "a b c"}],
                "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True},
            }).encode(),
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=10) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line]
        told = server.summary(rate=1)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    words = [c["choices"][0]["delta"].get("content") for c in chunks[:-1]]
    assert words == ["", *[" water"] * 5]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert set(told) == {
        "requests", "finished", "streams_max", "streams_mean", "window_s", "requests_per_s",
        "ttft_ms", "reply_ms", "tokens", "tokens_per_s", "itl_ms", "own_lag_ms", "late_ms",
        "blocked_writes", "first_request_ns", "first_generation_ns", "cpu_s",
    }  # fmt: skip
    assert (told["requests"], told["finished"], told["tokens"]) == (1, 1, 5)
    assert told["itl_ms"]["n"] == 4
    assert 7 <= told["ttft_ms"]["mean"] < 60
