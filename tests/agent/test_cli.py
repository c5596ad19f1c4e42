"""`agent assess --curve`: the verdict without a store, and what is wrong with what it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli import main
from agent.model import encode
from tests.agent.test_store import sweep

Command = pytest.CaptureFixture[str]

# As another tool's numbers are written in this form: no more than has to be there.
CURVE = {
    "run": {"id": "x", "started_at": "2026-01-01T00:00:00Z", "command": "theirs", "seed": 0,
            "tool_version": "1", "host": "h"},
    "target": {"url": "http://gpu:8000", "model": "m"},
    "workload": {"endpoint": "chat", "input_tokens": "512", "output_tokens": "128"},
    "levels": [
        {"concurrency": n, "output_tokens_per_s": rate, "ttft_ms": {"mean": 50, "n": 100},
         "itl_ms": {"mean": 10, "n": 100}, "request_throughput": rate / 128}
        for n, rate in ((1, 100), (4, 390), (16, 1400), (64, 1450), (128, 1460))
    ],
}  # fmt: skip


def agent(capsys: Command, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(args)
    out, err = capsys.readouterr()
    assert "defect" not in err
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


@pytest.fixture
def curve(tmp_path: Path) -> str:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(CURVE))
    return str(path)


def test_a_verdict_in_words_and_in_json(capsys: Command, curve: str) -> None:
    code, out, err = agent(capsys, "assess", "--curve", curve, "--expect-concurrency", "500")
    assert (code, err) == (0, "")
    assert out.startswith("UNDER_SIZED: ")
    assert "\n" + "do: " in out
    code, out, _ = agent(
        capsys, "assess", "--curve", curve, "--expect-concurrency", "500", "--format", "json"
    )
    assert json.loads(out)["finding"] == "UNDER_SIZED"
    code, out, _ = agent(capsys, "assess", "--curve", curve)
    assert (code, out.partition(":")[0]) == (0, "CAPACITY_ONLY")


def test_a_curve_on_stdin(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli", "assess", "--curve", "-"],
        input=encode(sweep()), capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert b": " in done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a sweep"),
        (b"{}", "missing required field"),
        (b"[1]", "not a sweep"),
        (b"\xff\xfe", "not a sweep"),
        (b"[" * 100_000, "not a sweep"),
        (b"concurrency,tokens\n1,2\n", "not a sweep"),
        (json.dumps(CURVE | {"levels": [{"concurrency": "x"}]}).encode(), "levels"),
    ],
)
def test_a_curve_that_is_none(capsys: Command, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    code, out, err = agent(capsys, "assess", "--curve", str(path))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"agent: --curve {path}: ")
    assert said in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["assess", "--curve", "/nowhere.json"], "No such file"),
        (["assess", "--curve", "/"], "Is a directory"),
        (["assess", "--curve", "CURVE", "--slo", "ttft<1"], "SLO target"),
        (["assess", "--curve", "CURVE", "--expect-rps", "0"], "--expect-rps"),
        (["assess", "--curve", "CURVE", "--expect-rps", "nan"], "--expect-rps"),
        (["assess", "--curve", "CURVE", "--expect-concurrency", "inf"], "--expect-concurrency"),
        (["assess", "--curve", "CURVE", "--format", "xml"], "--format"),
        (["asses"], "No such command 'asses'"),
    ],
)
def test_wrong_usage(capsys: Command, curve: str, args: list[str], said: str) -> None:
    code, out, err = agent(capsys, *(curve if word == "CURVE" else word for word in args))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err


def test_no_levels_is_a_verdict_too(capsys: Command, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(CURVE | {"levels": []}))
    code, out, _ = agent(capsys, "assess", "--curve", str(path))
    assert code == 0
    assert out


def test_levels_alone_are_a_curve(capsys: Command, tmp_path: Path) -> None:
    """The least that another tool can say: load, throughput and two means."""
    levels = [
        {"concurrency": n, "output_tokens_per_s": rate, "ttft_ms": {"mean": 20 * n},
         "itl_ms": {"mean": 10}}
        for n, rate in ((1, 100), (4, 390), (16, 1400), (64, 1450))
    ]  # fmt: skip
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps({"levels": levels}))
    args = ("assess", "--curve", str(file), "--slo", "ttft:mean<500ms", "--format", "json")
    code, out, _ = agent(capsys, *args, "--expect-concurrency", "8")
    assert code == 0
    verdict = json.loads(out)
    assert verdict["finding"] == "RIGHT_SIZED"
    assert verdict["capacity"]["lo"] == 16
