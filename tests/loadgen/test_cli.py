"""The command line without a server: usage, help, configuration file, environment, output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from agent.cli import cli as agent_cli
from agent.model import Sweep
from agent.store import Store
from loadgen import api, asked, flags
from loadgen import cli as module
from loadgen.config import Options
from loadgen.lengths import Fixed
from tests.agent.test_store import sweep as a_sweep
from tests.e2e.command import environment
from tests.loadgen.levels import closed_loop, side
from tests.loadgen.report import samples

ROOT = Path(__file__).parent.parent.parent
URL = "http://127.0.0.1:9"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in ("OPENAI_API_KEY", "SERVEFIT_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def loadgen(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        code = module._guarded(args)
        out, err = capsys.readouterr()
        assert "defect" not in err
        return code, out, err

    return run


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Options]]:
    """The options that a command arrives at; nothing is measured."""
    seen: list[Options] = []

    def measure(url: str, given: dict[str, Any], *, single: bool = False) -> int:
        seen.append(module.options_of(url, given))
        return 0

    monkeypatch.setattr(module, "_measure", measure)
    return iter([seen]).__next__()  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "which command? calibrate, compare, export, report, run"),
        (["serve"], "which command? sim, vllm"),
        (["sweep", URL, URL], "unexpected extra argument"),
        (["sweep", URL, "--demo"], "leave the URL away"),
        (["sweeep", URL], "No such command 'sweeep'"),
        (["sweep", URL, "--concurency", "1"], "--concurrency"),
        (["sweep", "ftp://x"], "neither http nor https"),
        (["sweep", "http://"], "names no host"),
        (["sweep", "http://u:p@h"], "--api-key-file"),
        (["sweep", "http://h:99999"], "write http://HOST:PORT"),
        (["sweep", "http://[::1"], "not a URL"),
        (["sweep", URL, "--concurrency", "1,x"], "--concurrency 'x'"),
        (["sweep", URL, "--concurrency", "²"], "--concurrency '²'"),
        (["sweep", URL, "--rate", "0"], "--rate '0'"),
        (["sweep", URL, "--rate", "1", "--concurrency", "1"], "either closed or open"),
        (["sweep", URL, "--rate", "1", "--arrival", "burst"], "--arrival"),
        (["sweep", URL, "--endpoint", "chats"], "--endpoint"),
        (["sweep", URL, "--endpoint", "rerank", "--output-tokens", "9"], "leave --output-tokens"),
        (["run", URL, "--endpoint", "embeddings", "--slo", "itl:p95<1s"], "no TTFT or ITL"),
        (["sweep", URL, "--input-tokens", "0"], "--input-tokens"),
        (["sweep", URL, "--input-tokens", "99999999999"], "--input-tokens"),
        (["sweep", URL, "--output-tokens", "1.5"], "--output-tokens"),
        (["sweep", URL, "--repeats", "0"], "--repeats"),
        (["sweep", URL, "--concurrency", "auto", "--rate", "auto"], "either closed or open"),
        (["sweep", URL, "--concurrency", "auto", "--rate", "1"], "either closed or open"),
        (["sweep", URL, "--concurrency", "1,auto"], "or auto"),
        (["sweep", URL, "--concurrency", "auto", "--repeats", "2"], "repeats the levels"),
        (["sweep", URL, "--budget", "1s"], "--budget: write at least 5s"),
        (["sweep", URL, "--budget", "x"], "--budget 'x'"),
        (["run", URL, "--rate", "auto"], "run takes a number as --rate"),
        (["sweep", "--resume", "nope"], "no run 'nope'"),
        (["sweep", "--demo", "--resume", "x"], "leave --demo away"),
        (["sweep", URL, "--requests", "none"], "--requests"),
        (["sweep", URL, "--requests", "4", "--duration", "1s"], "one of them ends a level"),
        (["sweep", URL, "--requests", "4", "--concurrency", "8"], "fewer than the 8 streams"),
        (["sweep", URL, "--duration", "soon"], "--duration 'soon'"),
        (["sweep", URL, "--warmup", "-1"], "--warmup"),
        (["sweep", URL, "--timeout", "0"], "--timeout"),
        (["sweep", URL, "--timeout", "9" * 400], "--timeout"),
        (["sweep", URL, "--slo", "ttft<1s"], "ttft:p95<500ms"),
        (["sweep", URL, "--slo", "tftf:p95<1s"], "did you mean 'ttft'"),
        (["sweep", URL, "--slo", "itl:p95<9ms", "--no-stream"], "--no-stream"),
        (["sweep", URL, "--seed", "-1"], "--seed"),
        (["sweep", URL, "--seed", "9" * 30], "--seed"),
        (["sweep", URL, "--expect-rps", "nan"], "--expect-rps"),
        (["sweep", URL, "--expect-concurrency", "0"], "--expect-concurrency"),
        (["sweep", URL, "--fail-on", "underisized"], "nearest is 'under_sized'"),
        (["sweep", URL, "--header", "nocolon"], "--header"),
        (["sweep", URL, "--api-key-file", "/nowhere"], "No such file"),
        (["sweep", URL, "--ca-file", "/nowhere"], "no such file"),
        (["sweep", URL.replace("http", "https"), "--ca-file", __file__], "--ca-file"),
        (["sweep", URL, "--metrics-url", "localhost"], "--metrics-url"),
        (["sweep", URL, "--agent", "localhost:9477"], "--agent 'localhost:9477' is no address"),
        (["sweep", URL, "--agent", URL, "--agent-token-file", "/nowhere"], "No such file"),
        (["sweep", URL, "--otlp-endpoint", "localhost"], "--otlp-endpoint"),
        (["sweep", URL, "--fail-on", "invalid,slo"], "by --slo"),
        (["sweep", URL, "--json", "-", "--csv", "-"], "only one of --json and --csv"),
        (["sweep", URL, "--json", "/"], "this is a directory"),
        (["sweep", URL, "--html", "/nowhere/x.html"], "there is no directory /nowhere"),
        (["sweep", "sim:nothing/llama-3.1-8b"], "unknown GPU 'nothing'"),
        (["sweep", "sim:h100-sxm"], "sim:"),
        (["run", URL, "--concurrency", "1,2"], "run takes one --concurrency"),
        (["run", URL, "--rate", "1,2"], "run takes one --rate"),
        (["report", "nope"], "no run 'nope'"),
        (["export", "--format", "xml"], "'xml' is not one of"),
        (["export", "nope"], "`loadgen runs` lists them"),
        (["sweep", URL, "--prices", "/nowhere.toml"], "prices file /nowhere.toml"),
        (["compare", "latest"], "Missing argument 'B'"),
        (["compare", "a", "b"], "no run 'a'"),
        (["compare", "/nowhere.json", "b"], "/nowhere.json: No such file"),
        (["compare", str(ROOT / "tests/golden/exports/vllm.json"), "b"], "not a sweep"),
        (["compare", "a", "b", "--fail-on", "slo"], "write METRIC<-X%"),
        (["compare", "a", "b", "--fail-on", "tokens<-5%"], "unknown metric 'tokens'"),
        (["compare", "a", "b", "--json", "/"], "this is a directory"),
        (["runs", "--db", "/nowhere.db"], "no such file"),
        (["runs", "--limit", "0"], "--limit"),
        (["serve", "sim", "nothing"], "sim:"),
        (["serve", "sim", "--port", "70000"], "--port"),
        (["serve", "vllm", "--python", "/nowhere/python"], "/nowhere/python"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_2(loadgen: Command, args: list[str], said: str) -> None:
    code, out, err = loadgen(*args)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith(("loadgen: ", "error: "))
    assert said in lines[0]
    assert out == ""


# ----------------------------------------------------------------------- configuration, environment


def config(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "load.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("concurency = [1]", "unknown key 'concurency', nearest is 'concurrency'"),
        ("no_stream = true", "unknown key 'no_stream', nearest is 'stream'"),
        ("[sweep]\nrequests = 1", "unknown key 'sweep'"),
        ("requests = 5\nrequests", "not TOML"),
        ("requests = 'many'", "--requests"),
        ("requests = [1, 2]", "--requests"),
        ("concurrency = true", "--concurrency"),
        ("concurrency = {a = 1}", "concurrency is a table"),
        ("stream = 'perhaps'", "--stream"),
        ("header = ['nocolon']", "--header"),
        ("duration = 2026-01-01", "--duration"),
        ("rate = [nan]", "--rate"),
        ("config = 'other.toml'", "unknown key 'config'"),
        (b"model = '\xff'", "no text in UTF-8"),
    ],
)
def test_a_configuration_that_is_wrong(
    loadgen: Command, tmp_path: Path, text: str | bytes, said: str
) -> None:
    code, _, err = loadgen("sweep", URL, "--config", config(tmp_path, text))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_configuration_that_is_not_there(loadgen: Command, tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        code, _, err = loadgen("sweep", URL, "--config", str(path))
        assert code == 2
        assert f"--config {path}: " in err
        assert "Errno" not in err


def test_a_file_then_the_environment_then_flags(
    loadgen: Command, options: list[Options], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
        url = "http://from-file"
        concurrency = [1, 2]
        input-tokens = 100
        output_tokens = 10
        timeout = "5s"
        stream = false
        header = "X-One: a b"
        seed = 7
    """
    monkeypatch.setenv("LOADGEN_OUTPUT_TOKENS", "20")
    monkeypatch.setenv("LOADGEN_SEED", "8")
    monkeypatch.setenv("LOADGEN_CONFIG", config(tmp_path, text))
    assert loadgen("sweep", "--seed", "9") == (0, "", "")
    [got] = options
    assert got.url == "http://from-file"
    assert got.concurrency == (1, 2)
    assert (got.input_tokens, got.output_tokens, got.seed) == (Fixed(100), Fixed(20), 9)
    assert (got.timeout_s, got.stream) == (5.0, False)
    assert got.headers == {"X-One": "a b"}


def test_what_excludes_a_flag_gives_way_to_it(
    loadgen: Command, options: list[Options], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, "concurrency = [1, 2]\nrequests = 5")
    assert loadgen("sweep", URL, "--config", file, "--rate", "3", "--duration", "4s")[0] == 0
    monkeypatch.setenv("LOADGEN_RATE", "2,4")
    assert loadgen("sweep", URL, "--config", file)[0] == 0
    assert loadgen("run", URL, "--concurrency", "7")[0] == 0
    assert [(o.concurrency, o.rates_rps, o.requests, o.duration_s) for o in options] == [
        ((), (3.0,), None, 4.0), ((), (2.0, 4.0), 5, None), ((7,), (), None, None),
    ]  # fmt: skip
    assert "--rate 2,4" in options[1].command
    assert "--rate" not in options[2].command
    monkeypatch.setenv("LOADGEN_CONCURRENCY", "1")
    assert loadgen("sweep", URL)[0] == 2  # both from one place


def test_headers_from_the_environment_are_a_line_each(
    loadgen: Command, options: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADGEN_HEADER", "X-One: a b\nAuthorization: Basic x")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert loadgen("sweep", URL)[0] == 0
    assert options[0].headers == {"X-One": "a b", "Authorization": "Basic x"}  # and no key of ours


def test_a_wrong_environment_is_wrong_usage(
    loadgen: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADGEN_REQUESTS", "many")
    code, _, err = loadgen("sweep", URL)
    assert code == 2
    assert "--requests" in err


def test_defaults(loadgen: Command, options: list[Options]) -> None:
    assert loadgen("sweep", URL)[0] == 0
    assert loadgen("run", URL)[0] == 0
    assert loadgen("sweep", URL, "--requests", "10")[0] == 0
    assert loadgen("sweep", "--demo", "--requests", "20")[0] == 0
    assert loadgen("sweep", URL, "--concurrency", "2", "--repeats", "2")[0] == 0
    assert [o.concurrency for o in options] == [
        (1, 2, 4, 8, 16, 32, 64), (1,), (1, 2, 4, 8), (1, 4, 16), (2,),
    ]  # fmt: skip
    assert len(options[-1].plans()) == 2
    assert options[3].url.startswith("sim:")


def test_the_command_that_is_kept_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["loadgen", "sweep", URL, "--header", "X: secret", "--header=Y: secret", "a\udcffb c"]
    monkeypatch.setattr(sys, "argv", argv)
    command = asked._command()
    assert "secret" not in command
    assert command == f"loadgen sweep {URL} --header 'X: …' '--header=Y: …' 'a?b c'"


# ------------------------------------------------------------------------------------------- help


def commands(group: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, group
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, f"{path} {name}")


COMMANDS = [*commands(module.cli, "loadgen"), *commands(agent_cli, "agent")]


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[path for path, _ in COMMANDS])
def test_every_command_and_option_has_its_help(path: str, command: click.Command) -> None:
    context = click.Context(command, info_name=path, max_content_width=100)
    text = command.get_help(context)
    assert text.startswith(f"Usage: {path}")
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{path} {parameter.opts} says nothing"
            assert max(parameter.opts, key=len) in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_options_of_the_contract() -> None:
    """Those that this version has; a contract option that appears must be documented here too."""
    asked = """
        --model --endpoint --concurrency --rate --arrival --input-tokens --output-tokens
        --reuse-prompts --requests --duration --warmup --slo --timeout --api-key-file --header
        --ca-file --insecure --metrics-url --agent --seed --repeats --expect-concurrency
        --expect-rps --fail-on --db --json --html --csv --otlp-endpoint --quiet --no-progress --yes
    """.split()  # noqa: SIM905
    there = {flag for p in module.cli.commands["sweep"].params for flag in p.opts}
    assert set(asked) <= there
    in_run = {flag for p in module.cli.commands["run"].params for flag in p.opts}
    assert set(asked) <= in_run


def test_the_readme_names_every_command_and_option() -> None:
    text = (ROOT / "README.md").read_text()
    reference = re.split(r"^#+ .*Reference.*$", text, flags=re.MULTILINE)
    if len(reference) < 2:
        pytest.skip("README has no Reference yet")
    for path, command in COMMANDS:
        if not isinstance(command, click.Group):
            assert path in text, f"README lacks {path}"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                flag = max(parameter.opts, key=len)
                assert flag in text, f"README lacks {flag} of {path}"


@pytest.mark.parametrize("args", ["--help", "sweep --help", "serve vllm -h", "--version"])
def test_help_of_the_real_command(tmp_path: Path, args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadgen.cli", *args.split()],
        env=environment(tmp_path), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""
    assert "loadgen" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    """What makes `loadgen --help` quick, without a clock: see the bench for the time itself."""
    code = (
        "import sys; from loadgen.cli import _guarded; _guarded(['--help'])\n"
        "heavy = {'aiohttp', 'numpy', 'rich', 'opentelemetry', 'uvloop', 'sqlite_utils'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"


# --------------------------------------------------------------------------------- from the store


@pytest.fixture
def kept() -> Sweep:
    kept = a_sweep()
    with Store() as store:
        store.save(kept, level=0)
    return kept


def test_an_empty_store(loadgen: Command) -> None:
    assert loadgen("runs") == (0, "", "no runs yet: `loadgen sweep --demo` makes one\n")
    code, _, err = loadgen("report")
    assert code == 2
    assert "no run 'latest'" in err


def test_runs_report_export(loadgen: Command, kept: Sweep, tmp_path: Path) -> None:
    code, out, _ = loadgen("runs")
    assert code == 0
    assert kept.run.id in out
    assert "unfinished" in out
    code, out, _ = loadgen("runs", "--json")
    assert f'"id": "{kept.run.id}"' in out
    code, out, _ = loadgen("report", kept.run.id[:5])
    assert (code, "streams" in out) == (0, True)
    page = tmp_path / "r.html"
    code, out, err = loadgen("report", "--html", str(page))
    assert (code, out, err) == (0, "", f"wrote {page}\n")
    assert page.read_text().startswith("<!doctype html>")
    target = tmp_path / "r.csv"
    code, out, err = loadgen("export", "--format", "csv", "-o", str(target))
    assert (code, out) == (0, "")
    assert target.read_text().startswith("run_id,")
    code, _, err = loadgen("export", "-o", str(tmp_path))
    assert code == 2
    assert "this is a directory" in err


def test_a_picture_and_a_card(loadgen: Command, tmp_path: Path) -> None:
    with Store() as store:
        store.save(samples.sweep())
    picture, card = tmp_path / "r.svg", tmp_path / "r.md"
    code, out, err = loadgen("report", "--svg", str(picture), "--card", str(card))
    assert (code, out, err) == (0, "", f"wrote {picture}\nwrote {card}\n")
    assert picture.read_text().startswith("<svg ")
    assert samples.sweep().run.id in card.read_text()
    assert loadgen("report", "--card", "-") == (0, card.read_text(), "")
    code, out, err = loadgen("report", "--card", "-", "--svg", "-")
    assert (code, out) == (2, "")
    assert "only one of" in err


def test_another_tools_files_need_requests(loadgen: Command, kept: Sweep) -> None:
    code, out, err = loadgen("export", "--format", "vllm")
    assert (code, out) == (2, "")
    assert "the store has no requests of level 1" in err


@pytest.fixture
def measured() -> list[str]:
    """Two runs in the store, two levels each, the second a tenth slower; their ids."""
    loads = ((2, 20), (4, 20))
    runs = [side(1, loads), side(2, loads, slower=1.1)]
    with Store() as store:
        for run, slower in zip(runs, (1.0, 1.1), strict=True):
            rng = np.random.default_rng(int(run.sweep.run.id.removeprefix("run-")))
            for index, load in enumerate(loads):
                rows = closed_loop(rng, *load, slower)
                store.save(run.sweep, level=index, requests=[{**r, "level": index} for r in rows])
    return [run.sweep.run.id for run in runs]


def test_another_tools_files(loadgen: Command, measured: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert loadgen("export", measured[0], "--format", "aiperf", "-o", str(out))[0] == 0
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.json"))
    assert files == [f"concurrency_{n}/profile_export_aiperf.json" for n in (2, 4)]
    assert loadgen("export", measured[0], "--format", "guidellm", "-o", str(out))[0] == 0
    assert len(json.loads((out / "benchmarks.json").read_text())["benchmarks"]) == 2
    named = out / "mine.json"
    assert loadgen("export", measured[0], "--format", "guidellm", "-o", str(named))[0] == 0
    assert named.read_bytes() == (out / "benchmarks.json").read_bytes()
    for where in ("-", str(tmp_path / "one.json")):
        code, _, err = loadgen("export", measured[0], "--format", "vllm", "-o", where)
        assert code == 2
        assert "has 2 levels, and vllm has one in a file: --output DIR" in err
    code, _, err = loadgen("export", measured[0], "--format", "vllm", "-o", str(named) + "/x")
    assert (code, "Not a directory" in err) == (2, True)


def test_comparing_runs(loadgen: Command, measured: list[str], tmp_path: Path) -> None:
    a, b = measured
    code, out, err = loadgen("compare", a, b)
    assert (code, err) == (0, "")
    assert "2 streams" in out
    assert "WORSE" in out
    assert "Holm" in out
    rule = "output_tokens_per_s<-5%"
    code, out, _ = loadgen("compare", a, b, "--fail-on", rule)
    assert code == 1
    assert f"gate MISSED: {rule} at 4 streams" in out
    assert loadgen("compare", b, a, "--fail-on", rule)[0] == 0
    code, out, err = loadgen("compare", a, b, "--json", "-", "--fail-on", rule)
    assert code == 1
    assert "WORSE" in err  # the table is out of the way of the JSON
    told = json.loads(out)
    assert [pair["load"] for pair in told["pairs"]] == [2.0, 4.0]
    assert {gate["missed"] for gate in told["gate"]} == {True}
    assert loadgen("compare", a, b, "--quiet") == (0, "", "")
    page = tmp_path / "both.html"
    assert loadgen("compare", a, b, "--quiet", "--html", str(page))[0] == 0
    text = page.read_text("utf-8")
    assert "B is worse" in text
    assert all(run in text for run in (a, b))
    assert loadgen("compare", a, b, "--html", "-")[1].startswith("<!doctype html>")
    code, _, err = loadgen("compare", a, b, "--html", "-", "--json", "-")
    assert (code, "name a file" in err) == (2, True)


def test_comparing_a_run_with_a_file(loadgen: Command, measured: list[str], tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    assert loadgen("export", measured[0], "-o", str(file))[0] == 0
    code, out, _ = loadgen("compare", str(file), measured[1], "--fail-on", "ttft_ms.p50>+1%")
    assert code == 3  # beyond its bound, and a file has no requests to test it with
    assert "gate UNDECIDED: ttft_ms.p50>+1% at 4 streams" in out
    assert "A file has no requests" in out
    code, _, err = loadgen("compare", str(file), str(file), "--db", str(tmp_path / "none.db"))
    assert (code, err) == (0, "")  # two files need no database


def test_the_example_configuration_is_taken(tmp_path: Path) -> None:
    """Refused for the unreachable target, so every key of the file was understood."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadgen.cli", "sweep", "http://127.0.0.1:9"),
            *("--config", str(ROOT / "config" / "loadgen.example.toml")),
        ],
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 4, done.stderr


def test_the_commented_options_of_the_example_exist() -> None:
    example = (ROOT / "config" / "loadgen.example.toml").read_text()
    named = re.findall(r"^(?:# )?([a-z_]+) =", example, re.MULTILINE)
    flags = {flag for p in module.cli.commands["sweep"].params for flag in p.opts}
    assert {f"--{name.replace('_', '-')}" for name in named} <= flags


def test_every_endpoint_can_be_asked_for() -> None:
    assert tuple(api.ENDPOINTS) == flags.ENDPOINTS
