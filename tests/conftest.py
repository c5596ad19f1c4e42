"""Fixtures of real servers, the order of the tests, and what of the real parts was missing.

Everything here is a process on a free port of 127.0.0.1, started once a session (vLLM and Phoenix
by tests/ahead.py, while other tests run) and stopped when nobody needs it any more. `make
real-parts` installs what is needed; a test that lacks a part skips and says so.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from loadgen.targets.process import running
from loadgen.targets.vllm import free_port
from tests.ahead import SERVERS, Ahead, find_phoenix, find_vllm_python, real_dir
from tests.support import require


def find_kubernetes_validate() -> Path | None:
    command = real_dir() / "kubernetes" / "bin" / "kubernetes-validate"
    return command if command.exists() else None


def find_victoria_metrics() -> Path | None:
    return _unpacked("victoria-metrics")


def find_promtool() -> Path | None:
    return _unpacked("promtool")


def _unpacked(name: str) -> Path | None:
    command = real_dir() / name / name
    return command if command.exists() else None


def find_axe() -> Path | None:
    script = real_dir() / "axe" / "node_modules" / "axe-core" / "axe.min.js"
    return script if script.exists() else None


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real headless Chromium, driven by playwright."""
    chromium = find_chromium()
    require(chromium, "Chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        require(False, "playwright")
        raise
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


# A law is no faster or slower on a busy machine: speed is `make bench`'s.
hypothesis.settings.register_profile("servefit", deadline=None)
hypothesis.settings.load_profile("servefit")


# ------------------------------------------------------------------- order, and what starts early

_AHEAD = pytest.StashKey[Ahead]()


def _order(item: pytest.Item) -> int:
    """Real servers last, because they start meanwhile; before them what runs several at a time."""
    names = getattr(item, "fixturenames", ())
    return 2 if SERVERS.keys() & set(names) else int("together" in names)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_order)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    gc.collect()
    gc.freeze()  # what collecting made stays; a level collects before it begins, and looks at less
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    there = {"phoenix": find_phoenix() is not None}
    has_vllm = find_vllm_python() is not None
    names = [one for one in SERVERS if one in used and there.get(one, has_vllm)]
    if names:
        session.config.stash[_AHEAD] = Ahead(names)


def pytest_unconfigure(config: pytest.Config) -> None:
    if one := config.stash.get(_AHEAD, None):
        one.close()


@pytest.fixture(scope="session")
def ahead(pytestconfig: pytest.Config) -> Ahead:
    return pytestconfig.stash[_AHEAD]


@pytest.fixture(scope="session")
def settled(pytestconfig: pytest.Config) -> None:
    """From here on no server is starting that would take a core from a measurement."""
    if one := pytestconfig.stash.get(_AHEAD, None):
        one.settle()


# ------------------------------------------------------------------------------------------ vLLM


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The path of an interpreter that has vLLM."""
    python = find_vllm_python()
    require(python, "vLLM (make real-parts)")
    assert python is not None
    return python


@pytest.fixture(scope="session")
def real_vllm(vllm_python: str, ahead: Ahead) -> Iterator[str]:
    """The base URL of a real vLLM on the tiny model, shared by all tests of the session.

    It is up after about 30 s and holds 2.5 GB. Other tests have asked it things before: compare
    counters by their increase. Its admission cap and KV cache are vLLM's own defaults.
    """
    with ahead.running("real_vllm") as url:
        yield url


@pytest.fixture(scope="module")
def planted_vllm(vllm_python: str, ahead: Ahead, settled: None) -> Iterator[str]:
    """A vLLM with a small KV cache and a small --max-num-seqs: the load tells which one binds."""
    with ahead.running("planted_vllm") as url:
        yield url


@pytest.fixture(scope="module")
def pooling_vllm(vllm_python: str, ahead: Ahead) -> Iterator[str]:
    """The tiny model as one of embeddings; with such a model vLLM answers /v1/rerank too."""
    with ahead.running("pooling_vllm") as url:
        yield url


@dataclass(frozen=True)
class Spanning:
    """A vLLM that sends its spans to a port on which nobody listens yet."""

    url: str
    spans_port: int


@pytest.fixture(scope="module")
def spanning_vllm(vllm_python: str, ahead: Ahead) -> Iterator[Spanning]:
    with ahead.running("spanning_vllm") as url:
        yield Spanning(url, ahead.spans_port)


# --------------------------------------------------------------------------------------- Phoenix


@dataclass(frozen=True)
class Phoenix:
    """A running Arize Phoenix. `otlp_endpoint` is what `--otlp-endpoint` takes."""

    url: str

    @property
    def otlp_endpoint(self) -> str:
        return self.url

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return json.load(reply)

    def spans(self, trace_id: int) -> list[dict[str, Any]]:
        """Every span of one trace that has arrived, page by page, in Phoenix's own shape."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = self.get(
                f"/v1/projects/default/spans?limit=1000&trace_id={trace_id:032x}{cursor}"
            )
            found += page["data"]
            if not page["next_cursor"]:
                return found
            cursor = f"&cursor={page['next_cursor']}"

    def wait_for_spans(
        self, trace_id: int, n: int, timeout_s: float = 60.0
    ) -> list[dict[str, Any]]:
        """The spans of one trace once there are `n`, or what there is in the end.

        Phoenix answers before it has written, so what was delivered appears seconds later.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.spans(trace_id)
            if len(found) >= n or time.monotonic() > deadline:
                return found
            time.sleep(0.5)


@pytest.fixture(scope="session")
def phoenix(request: pytest.FixtureRequest) -> Iterator[Phoenix]:
    """A real trace back end (up after about 20 s, 0.6 GB); tests tell their spans by trace id."""
    require(find_phoenix(), "Arize Phoenix (make real-parts)")
    ahead: Ahead = request.getfixturevalue("ahead")
    with ahead.running("phoenix") as url:
        yield Phoenix(url)


# ------------------------------------------------------------------------------- VictoriaMetrics


class VictoriaMetrics:
    """A real VictoriaMetrics that de-duplicates; `stop` and `start` make an outage of it.

    Its address and what it stored outlive an outage. `endpoint` is a base URL for OTLP.
    """

    def __init__(self, command: Path, folder: Path) -> None:
        self._command = command
        self._folder = folder
        self._port = free_port("127.0.0.1", 0)
        self._running: ExitStack | None = None
        self.url = f"http://127.0.0.1:{self._port}"
        self.endpoint = f"{self.url}/opentelemetry"

    def start(self) -> None:
        if self._running is not None:
            return
        arguments = (
            f"-httpListenAddr=127.0.0.1:{self._port}",
            f"-storageDataPath={self._folder / 'data'}",
            "-retentionPeriod=1y",
            "-dedup.minScrapeInterval=1ms",
            "-opentelemetry.usePrometheusNaming",
            "-memory.allowedBytes=64MB",
            "-search.latencyOffset=0s",
            "-search.disableCache",
        )
        self._running = ExitStack()
        self._running.enter_context(
            running(
                [str(self._command), *arguments],
                url=self.url,
                health="/health",
                timeout_s=60.0,
                log=self._folder / "victoria-metrics.log",
                name="VictoriaMetrics",
            )
        )

    def stop(self) -> None:
        """By SIGTERM: killed, it would lose the last seconds of what it acknowledged."""
        running_one, self._running = self._running, None
        if running_one is not None:
            running_one.close()

    def _get(self, path: str, **query: str) -> bytes:
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as reply:
            return bytes(reply.read())

    def flush(self) -> None:
        """Makes what was taken visible to queries."""
        self._get("/internal/force_flush")

    def export(self, match: str) -> list[dict[str, Any]]:
        """Every stored sample of the matching series, de-duplicated: metric, timestamps in ms,
        values."""
        self.flush()
        raw = self._get("/api/v1/export", **{"match[]": match, "start": "0"})
        return [json.loads(line) for line in raw.splitlines()]

    def query(self, promql: str, at_unix_s: float) -> list[tuple[dict[str, str], float]]:
        """The result of an instant query: labels and value of each series."""
        self.flush()
        answer = json.loads(self._get("/api/v1/query", query=promql, time=f"{at_unix_s:.3f}"))
        return [(one["metric"], float(one["value"][1])) for one in answer["data"]["result"]]


@pytest.fixture(scope="session")
def _victoria_metrics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VictoriaMetrics]:
    command = find_victoria_metrics()
    require(command, "VictoriaMetrics (make real-parts)")
    assert command is not None
    one = VictoriaMetrics(command, tmp_path_factory.mktemp("victoria-metrics"))
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture
def victoria_metrics(_victoria_metrics: VictoriaMetrics) -> VictoriaMetrics:
    """A real metrics back end (up in a second, 30 MB), running; tests tell their series by labels
    or resource attributes of their own."""
    _victoria_metrics.start()
    return _victoria_metrics


# --------------------------------------------------------------------------------------- summary


def missing_parts() -> list[str]:
    """The real parts that are not on this machine, each with what brings it."""
    parts = {
        "a real vLLM (make real-parts)": find_vllm_python(),
        "Arize Phoenix (make real-parts)": find_phoenix(),
        "Kubernetes' schemas (make real-parts)": find_kubernetes_validate(),
        "VictoriaMetrics (make real-parts, on Debian)": find_victoria_metrics(),
        "promtool (make real-parts, on Debian)": find_promtool(),
        "axe-core (make real-parts, with npm)": find_axe(),
        "Chromium (make real-parts as root, or your distribution's package)": find_chromium(),
        "a C compiler, for the NVML stand-in (gcc or clang)": shutil.which("cc"),
        "an NVIDIA GPU": Path("/dev/nvidiactl").exists(),
    }
    return [part for part, there in parts.items() if not there]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missing = missing_parts()
    terminalreporter.section("real parts")
    if not missing:
        terminalreporter.write_line("all there")
    for part in missing:
        terminalreporter.write_line(f"missing: {part}")
