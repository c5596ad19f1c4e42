"""loadgen from Python: what it takes, returns, prints and raises, in a script and in a notebook."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import loadgen
from agent.model import StoreError, Sweep, TargetError, UsageError
from agent.sizing.curve import parse_slo
from agent.store import Store
from loadgen import cli, find, library
from loadgen.config import Options
from loadgen.lengths import Fixed
from loadgen.report.live import Progress
from loadgen.session import Watcher
from tests.e2e.command import environment, until
from tests.e2e.misbehaving import good, refusal, serving

ROOT = Path(__file__).parents[2]
SMALL = {"input_tokens": 16, "output_tokens": 3, "metrics_url": "none"}
URL = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as address:
        yield f"http://{address}"


def options(name: str = "sweep", url: str = URL, **given: Any) -> Options:
    return library._parsed(name, url, None, given, library._Log())[0]


# --------------------------------------------------------------------------------------- options


def test_keywords_are_the_flags_with_pythons_types() -> None:
    got = options(
        concurrency=[1, 4, 16], slo="e2e:p95<5s", duration=0.5, timeout="2s", warmup=3,
        header={"X-One": "a: b", "X-Two": "c"}, stream=False, reuse_prompts=True, seed=7,
        expect_rps=2, model=None, yes=False,
    )  # fmt: skip
    assert got.concurrency == (1, 4, 16)
    assert (got.duration_s, got.timeout_s, got.warmup_requests) == (0.5, 2.0, 3)
    assert got.headers == {"X-One": "a: b", "X-Two": "c"}
    assert (got.stream, got.reuse_prompts, got.seed, got.expect_rps) == (False, True, 7, 2.0)
    assert (got.model, got.yes) == (None, False)
    assert options(rate=(0.5, 2)).rates_rps == (0.5, 2.0)
    assert options(concurrency=range(1, 4)).concurrency == (1, 2, 3)
    assert options(concurrency=8).concurrency == (8,)
    slo = "ttft:p95<500ms,itl:p50<9ms"
    assert options(slo=parse_slo(slo)).slo == options(slo=slo).slo == tuple(parse_slo(slo))
    assert options(header=["A: 1", "B: 2"]).headers == options(header={"A": 1, "B": 2}).headers
    assert options(header="A: --b").headers == {"A": "--b"}
    assert options("run").concurrency == (1,)


def test_every_flag_of_the_command_is_a_keyword() -> None:
    """None of them listed by hand: a new flag is a new keyword."""
    for name in ("sweep", "run"):
        command = cli.cli.commands[name]
        flags = {max(p.opts, key=len) for p in command.params if p.opts[0].startswith("--")}
        keywords = {flag.removeprefix("--").replace("-", "_") for flag in flags}
        for keyword in keywords - set(library.ONLY_COMMANDS):
            library._arguments(command, {keyword: None})


def test_what_is_kept_is_the_command_that_repeats_it() -> None:
    kept = options(concurrency=[1, 2], header={"X": "secret"}, slo="ttft:p95<1s").command
    assert kept == (f"loadgen sweep {URL} --concurrency=1,2 '--header=X: …' '--slo=ttft:p95<1s'")


def test_the_environment_and_a_file_stand_behind_keywords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADGEN_SEED", "5")
    file = tmp_path / "load.toml"
    file.write_text("seed = 4\noutput_tokens = 9")
    got = options(config=file, input_tokens=8)
    assert (got.seed, got.output_tokens, got.input_tokens) == (5, Fixed(9), Fixed(8))
    assert options(seed=6).seed == 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"concurency": 1}, "sweep() has no option 'concurency', nearest is 'concurrency'"),
        ({"quiet": True}, "'quiet' is of the command line only"),
        ({"fail_on": "slo"}, "'fail_on' is of the command line only"),
    ],
)
def test_an_unknown_keyword_is_a_type_error(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        loadgen.sweep(URL, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"requests": "many"}, "--requests"),
        ({"concurrency": [1, "x"]}, "--concurrency 'x'"),
        ({"concurrency": 1, "rate": 1}, "either closed or open loop"),
        ({"slo": "ttft<1s"}, "ttft:p95<500ms"),
        ({"duration": "soon"}, "--duration 'soon'"),
        ({"endpoint": "chats"}, "--endpoint"),
        ({"demo": True}, "leave the URL away"),
        ({"json": "-"}, "json='-': a function returns its result"),
        ({"html": "/nowhere/x.html"}, "there is no directory /nowhere"),
        ({"config": "/nowhere.toml"}, "No such file"),
        ({"concurrency": 99_000}, "--concurrency 99000 takes"),
    ],
)
def test_an_option_that_cannot_be_is_a_usage_error(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        loadgen.sweep(URL, **given)
    with pytest.raises(UsageError, match="run takes one --concurrency"):
        loadgen.run(URL, concurrency=[1, 2])


# -------------------------------------------------------------------------------------- measuring


def test_a_sweep_is_typed_kept_and_silent(
    server: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, table = tmp_path / "r.html", tmp_path / "r.csv"
    result = loadgen.sweep(
        server, concurrency=[1, 2], requests=6, slo="e2e:p95<5s", html=page, csv=table, **SMALL
    )
    assert isinstance(result, Sweep)
    assert [level.concurrency for level in result.levels] == [1, 2]
    assert all(level.requests and level.requests.ok == 6 for level in result.levels)
    assert result.verdict is not None
    assert capfd.readouterr() == ("", "")
    assert loadgen.load() == loadgen.load(result.run.id) == result
    assert page.read_text().startswith("<!doctype html>")
    assert table.read_text().count("\n") == 3
    assert "<table>" in result._repr_html_()


def test_what_db_says(server: str, tmp_path: Path) -> None:
    nowhere = loadgen.run(server, requests=2, db=False, **SMALL)
    with pytest.raises(UsageError, match="no run 'latest'"):
        loadgen.load()
    named = tmp_path / "named.db"
    kept = loadgen.run(server, requests=2, db=named, **SMALL)
    assert loadgen.load(db=named) == kept != nowhere
    assert loadgen.run(server, requests=2, db=True, **SMALL) == loadgen.load()
    with pytest.raises(StoreError, match=r"named\.db"):
        loadgen.run(server, requests=2, db=named / "below" / "a" / "file", **SMALL)


def test_a_store_that_cannot_be_is_a_warning_and_no_loss(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="this run is not kept"):
        result = loadgen.run(server, requests=2, **SMALL)
    assert len(result.levels) == 1


def test_progress_is_said_where_it_is_asked_for(
    server: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loadgen"):
        loadgen.run(server, requests=2, **SMALL)
    assert "level [1/1] 1 stream" in caplog.text
    assert "2 ok" in caplog.text
    assert capfd.readouterr() == ("", "")
    loadgen.run(server, requests=2, progress=True, **SMALL)
    out, err = capfd.readouterr()
    assert out == ""
    assert "[1/1] 1 stream: running" in err


def test_a_simulated_engine_needs_no_server() -> None:
    result = loadgen.run("sim:h100-sxm/llama-3.1-8b", concurrency=2, requests=4, **SMALL)
    assert result.run.simulated
    assert result.target.url.startswith("sim:")


def test_the_server_on_this_machine_is_found(
    server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(find, "PORTS", (int(server.rpartition(":")[2]),))
    result = loadgen.run(requests=2, **SMALL)
    assert result.target.url == server
    assert f"{server}" in result.run.command
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(find, "PORTS", ())
    with pytest.raises(TargetError, match="no inference server found"):
        loadgen.sweep()


def test_a_target_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no connection"):
        loadgen.sweep(URL)
    with serving(pages={"/v1/models": refusal(401)}) as address, pytest.raises(TargetError):
        loadgen.run(f"http://{address}", **SMALL)


# ------------------------------------------------------------------------- notebooks, interruption


async def test_it_runs_where_a_loop_is_running(server: str) -> None:
    """As in a notebook's cell; and awaited, several at once, while the caller's loop goes on."""
    assert len(loadgen.run(server, requests=2, **SMALL).levels) == 1
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    first, second = await asyncio.gather(
        loadgen.sweep_async(server, concurrency=[1, 2], duration="0.5s", db=False, **SMALL),
        loadgen.run_async(server, requests=2, db=False, **SMALL),
    )
    ticking.cancel()
    assert (len(first.levels), len(second.levels)) == (2, 1)
    assert ticks > 20
    with pytest.raises(UsageError):
        await loadgen.run_async(server, requests=0)
    with pytest.raises(TypeError):
        await loadgen.run_async(server, request=1)


async def test_a_cancelled_one_keeps_what_it_measured(tmp_path: Path) -> None:
    database = tmp_path / "runs.db"
    slow = partial(good, tokens=3, pause_s=0.05)
    with serving(slow) as address:
        running = asyncio.create_task(
            loadgen.run_async(f"http://{address}", duration=60, db=database, **SMALL)
        )
        await asyncio.sleep(2.0)
        began = time.monotonic()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert time.monotonic() - began < 5
    kept = loadgen.load(db=database)
    assert kept.run.interrupted
    assert kept.levels[0].requests is not None
    assert kept.levels[0].requests.ok > 2


SCRIPT = """
import loadgen
try:
    loadgen.run({url!r}, duration=60, progress=True, **{small!r})
except KeyboardInterrupt:
    print("stopped")
    print(loadgen.load().run.interrupted)
"""


def test_ctrl_c_ends_the_level_and_is_raised(tmp_path: Path) -> None:
    with serving() as address:
        code = SCRIPT.format(url=f"http://{address}", small=SMALL)
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment(tmp_path, PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        while "running" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert out == "stopped\nTrue\n", err
    assert "Traceback" not in err


def test_ctrl_c_before_the_first_level_leaves_nothing(tmp_path: Path) -> None:
    measurement = library._Measurement("run", URL, False, False, SMALL)
    measurement.stop()
    until(measurement.result.done)
    assert isinstance(measurement.result.exception(), asyncio.CancelledError | TargetError)


# ------------------------------------------------------------------------------------ the package


def test_import_is_light_and_typed() -> None:
    code = (
        "import sys, loadgen\n"
        "heavy = {'aiohttp', 'numpy', 'rich', 'opentelemetry', 'uvloop', 'sqlite_utils', 'click'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(sorted(loadgen.__all__), callable(loadgen.sweep))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stdout == ("[]\n['load', 'run', 'run_async', 'sweep', 'sweep_async'] True\n"), (
        done.stderr
    )
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        loadgen.sweeep  # type: ignore[attr-defined]  # noqa: B018
    for package in ("agent", "loadgen"):
        assert (ROOT / package / "py.typed").exists()


def test_no_module_hides_a_function() -> None:
    """`import loadgen.sweep` would put the module where the function is."""
    names = {path.stem for path in (ROOT / "loadgen").glob("*")}
    assert names.isdisjoint(loadgen.__all__)


def test_the_readme_example_works(server: str, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000" in example
    code = example.replace("http://127.0.0.1:8000", server)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=environment(tmp_path, PYTHONPATH=str(ROOT), LOADGEN_DURATION="0.5s"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["1", "4", "16"]


def test_watchers_are_told_the_same() -> None:
    """The log and the terminal have the methods that a session calls."""
    told = {name for name in vars(Watcher) if not name.startswith("_")}
    for watcher in (Progress, library._Log):
        assert told <= set(vars(watcher))


def test_json_is_the_runs(server: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    result = loadgen.run(server, requests=2, json=file, **SMALL)
    assert json.loads(file.read_bytes())["run"]["id"] == result.run.id
    with Store() as store:
        assert store.load("latest") == result
    if os.geteuid() != 0:
        return
    with pytest.raises(UsageError, match="No space left"):
        loadgen.run(server, requests=2, html="/dev/full", **SMALL)
