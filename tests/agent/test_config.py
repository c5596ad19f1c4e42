"""The agent's configuration: what a file says, what is wrong with it; no secret is shown."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config
from agent.cli import main
from agent.config import Config, Server, fields, line_of, load, parse, render
from agent.model import Slo, UsageError

EXAMPLE = Path(__file__).parents[2] / "config" / "agent.example.toml"
TOKEN = "c3VjaCBhIHNlY3JldCBpcyBub3Qgc2hvd24"

WHOLE = """
[agent]
db = "data/agent.db"
listen = "0.0.0.0:9477"
token_file = "token"

[store]
raw = "2d"
free_floor = "2GiB"

[gpu]
source = "dcgm"
url = "http://gpus:9400/metrics"
interval = "2s"

[[server]]
name = "chat"
url = "https://one:8000/v1"
gpus = [0, "GPU-5c8e"]
slo = "ttft:p95<500ms,e2e:p99<30s"
service = "all"
headers_file = "headers"

[[server]]
url = "http://[::1]:8001/"
interval = "1500ms"

[slo]
targets = "itl:p95<50ms"

[assess]
every = "30m"
expect_concurrency = 24

[export.otlp]
endpoint = "http://collector:4318"

[receive.otlp]

[prices]
file = "prices.toml"
"""


def test_an_empty_file_says_the_defaults() -> None:
    assert parse("") == Config()


def test_every_key_is_read() -> None:
    read = parse(WHOLE, folder=Path("/etc/servefit"))
    assert read.agent.db == Path("/etc/servefit/data/agent.db")
    assert read.agent.token_file == Path("/etc/servefit/token")
    assert (read.store.raw_s, read.store.minutes_s) == (2 * 86400, 90 * 86400)
    assert read.store.free_bytes_min == 2 * 2**30
    assert (read.gpu.source, read.gpu.url) == ("dcgm", "http://gpus:9400/metrics")
    chat, other = read.server
    assert chat.url == "https://one:8000"
    assert chat.metrics_url == "https://one:8000/metrics"
    assert chat.gpus == (0, "GPU-5c8e")
    assert chat.slo == (Slo("ttft", "p95", 500), Slo("e2e", "p99", 30_000))
    assert (other.name, other.url, other.interval_s) == ("[::1]:8001", "http://[::1]:8001", 1.5)
    assert read.slo.targets == (Slo("itl", "p95", 50),)
    assert (read.assess.every_s, read.assess.expect_concurrency) == (1800, 24)
    assert read.export.otlp is not None
    assert read.export.otlp.endpoint == "http://collector:4318"
    assert read.receive.otlp is not None
    assert read.receive.otlp.listen == "127.0.0.1:4319"


def test_what_is_written_reads_back_as_the_same() -> None:
    folder = Path("/etc/servefit")
    read = parse(WHOLE, folder=folder)
    assert parse(render(read)) == read
    assert parse(render(Config())) == Config()


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
WORDS = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1)
FILES = WORDS.map(lambda word: Path("/etc") / word)
SERVERS = st.builds(
    Server,
    name=NAMES,
    url=NAMES.map(lambda name: f"http://{name.strip('._-') or 'x'}:8000"),
    interval_s=st.integers(1000, 3_600_000).map(lambda ms: ms / 1000),
    gpus=st.lists(st.integers(0, 99), unique=True, max_size=4).map(tuple),
    slo=st.lists(
        st.builds(
            Slo,
            metric=st.sampled_from(["ttft", "itl"]),
            statistic=st.sampled_from(["mean", "p99"]),
            bound_ms=st.integers(1, 10_000).map(float),
        ),
        max_size=3,
    ).map(tuple),
    ca_file=st.none() | FILES,
)


@given(SERVERS, st.floats(0.001, 1e6, allow_nan=False), st.integers(16 * 2**20, 2**49))
def test_whatever_can_be_said_reads_back(server: Server, load: float, floor: int) -> None:
    said = Config(
        server=(server,),
        store=config.Store(free_bytes_min=floor),
        assess=config.Assess(expect_concurrency=load),
    )
    assert parse(render(said)) == said


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gpu]\n\nintervall = '1s'", 'a.toml:3: [gpu] intervall: unknown key, did you mean "'),
        ("[gpus]", 'a.toml:1: gpus: unknown section, did you mean "gpu"?'),
        ("[export]\n[export.otpl]", 'a.toml:2: [export] otpl: unknown section, did you mean'),
        ("listen = '127.0.0.1:1'", "unknown at the top: it belongs under [agent]"),
        ("url = 'http://a'", "it belongs under [gpu]"),
        ("[[server]]\n[[server]]\nnam = 'x'", "a.toml:3: [server] nam: unknown key"),
        ("[gpu]\ninterval = 5", 'a.toml:2: [gpu] interval: write a time with its unit'),
        ("[gpu]\ninterval = '5 years'", "write a time with its unit"),
        ("[gpu]\ninterval = '10ms'", "it may be 1s to 1h"),
        ("[gpu]\nsource = 'dcmg'", 'did you mean "dcgm"?'),
        ("[gpu]\nsource = true", 'write one of "auto"'),
        ("[store]\nfree_floor = '1G'", "write a size with its unit"),
        ("[store]\nfree_floor = '1MB'", "it may not be under 16MiB"),
        ("[assess]\ntrains = 'no'", "a.toml:2: [assess] trains: write true or false"),
        ("[assess]\nexpect_concurrency = 0", "write a number above 0"),
        ("[assess]\nexpect_concurrency = nan", "write a number above 0"),
        ("[assess]\nexpect_concurrency = true", "write a number above 0"),
        ("[slo]\ntargets = 'ttft:p95<500'", "the bound needs a unit"),
        ("[slo]\ntargets = ''", "the SLO is empty"),
        ("[[server]]\nslo = 'tft:p95<1s'", "did you mean 'ttft'"),
        ("[[server]]\nname = 'a b'", "write a short name"),
        ("[[server]]\nurl = '127.0.0.1:8000'", 'write an address such as "http://127.0.0.1:8000"'),
        ("[[server]]\nurl = 'http://[::1'", "write an address"),
        ("[[server]]\nurl = 'http://h:99999'", "write an address"),
        ("[[server]]\nurl = 'http://h/?key=s'", "it takes no query"),
        ("[[server]]\ngpus = []", "write a list of indices or UUIDs"),
        ("[[server]]\ngpus = [0, 0]", "twice"),
        ("[[server]]\ngpus = ['A100']", "write a list of indices or UUIDs"),
        ("[[server]]\nca_file = 3", "write the path of a file"),
        ("[agent]\nlisten = '9477'", "write an address and a port"),
        ("[agent]\nlisten = '127.0.0.1:99999'", "write an address and a port"),
        ("[server]\nurl = 'http://a'", "write two brackets, [[server]]"),
        ("agent = 3", "a.toml:1: agent: write it as a section, [agent]"),
        ("[export]\notlp = 3", "write it as a section, [export.otlp]"),
        ("[agent", "a.toml: is not TOML"),
        ("x = " + "[" * 5000, "a.toml: is not TOML"),
        ("x = " + "1" * 5000, "a.toml: is not TOML"),
        ('"a\\nb" = 1', "a.toml: a b: unknown section"),
        # contradictions
        ("[agent]\nlisten = '0.0.0.0:9477'", "a.toml:2: [agent] listen: 0.0.0.0:9477 can"),
        ("[agent]\nlisten = 'gpu-host:9477'", "give token_file"),
        ("[[server]]\nname = 'a'\n[[server]]\nurl = 'http://b:1'\nname = 'a'",
         'a.toml:5: [server] name: two servers are called "a"'),
        ("[[server]]\nname = 'gpu'", 'a.toml:2: [server] name: "gpu" is what the agent calls'),
        ("[[server]]\nname = 'service:x'", '"service:x" is what the agent calls'),
        ("[[server]]\nname = 'a'\n[[server]]\nname = 'b'", "read the same page"),
        ("[[server]]\ngpus = [1]\n[[server]]\nurl = 'http://b:1'\n\ngpus = [0, 1]",
         "a.toml:6: [server] gpus: GPU 1 is given to"),
        ("[gpu]\nsource = 'none'\n[[server]]\ngpus = [1]", 'source = "none" reads none'),
        ("[gpu]\nsource = 'dcgm'", "needs url"),
        ("[gpu]\nurl = 'http://gpus:9400/metrics'", 'is used with source = "dcgm"'),
        ("[receive.otlp]\nlisten = '0.0.0.0:4319'", "is not the loopback"),
        ("[receive.otlp]\nlisten = '127.0.0.1:9477'", "is [agent] listen too"),
        ("[receive.otlp]\n[export.otlp]\nendpoint = 'http://localhost:4319'", "would come back"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_says_where_and_what_to_write(text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(text, "a.toml")
    assert said in str(raised.value)
    assert str(raised.value).startswith("a.toml:")
    assert "\n" not in str(raised.value)


SECTIONS = ("[agent]", "[store]", "[gpu]", "[[server]]", "[slo]", "[assess]", "[export.otlp]",
            "[receive.otlp]", "[prices]", "[export]", "")  # fmt: skip
KEYS = sorted({key for keys in config._KEYS.values() for key in keys} | {"otlp", "x", "agent"})
VALUES = (
    "0", "-1", "1e400", "nan", "true", '""', "[]", "{}", "[{a = 1}]", "[[0]]", "1979-05-27",
    '"http://[::1]:x"', '"//"', '"\\u0000"', '"~nobody/x"', '"[::]:1"', '"1e9d"', '"½s"',
)  # fmt: skip


@given(st.sampled_from(SECTIONS), st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text())
def test_whatever_stands_there_is_read_or_refused_in_one_line(
    section: str, key: str, value: str
) -> None:
    said = ""
    try:
        parse(f"{section}\n{key} = {value}", "a.toml")
    except UsageError as error:
        said = str(error)
    assert said == "" or said.startswith("a.toml")
    assert "\n" not in said


def test_a_token_or_a_clear_word_opens_the_agent_to_others() -> None:
    for more in ("token_file = 'token'", "allow_no_token = true"):
        assert parse(f"[agent]\nlisten = '0.0.0.0:9477'\n{more}").agent.listen == "0.0.0.0:9477"


def test_a_line_that_cannot_be_seen_is_left_out() -> None:
    with pytest.raises(UsageError, match=r"^a\.toml: \[gpu\] interval: write"):
        parse("gpu = {interval = 5}", "a.toml")


def test_lines_are_found() -> None:
    text = '[[server]] # one\nname = "a"\n\n[[server]]\n"name" = "b"\n[gpu]\ninterval = 1'
    assert line_of(text, "server", 0, "name") == 2
    assert line_of(text, "server", 1, "name") == 5
    assert line_of(text, "server", 1, "url") == 4
    assert line_of(text, "gpu", 0, "interval") == 7
    assert line_of(text, "assess") is None


# ------------------------------------------------------------------------------- files and secrets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "headers").write_text(f"# of the gateway\nAuthorization: Bearer {TOKEN}\n\n")
    (tmp_path / "prices.toml").write_text("")
    (tmp_path / "agent.toml").write_text(WHOLE)
    return tmp_path


def test_files_are_looked_into_and_never_shown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["config", "check", str(folder / "agent.toml")])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert TOKEN not in out
    assert parse(out) == load(folder / "agent.toml")


def test_a_key_in_a_metrics_address_is_not_printed() -> None:
    said = parse("[[server]]\nmetrics_url = 'http://a/metrics?key=geheim'")
    assert said.server[0].metrics_url.endswith("key=geheim")
    assert "geheim" not in render(said)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="use headers_file") as raised:
        parse("[[server]]\nurl = 'http://user:geheim@host:8000'")
    assert "geheim" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("token", None, "token_file {}: cannot be read: No such file"),
        ("token", "geheim", "holds no token of at least 16"),
        ("token", "geheim geheim geheim", "openssl rand -hex 32"),
        ("headers", None, "headers_file {}: cannot be read"),
        ("headers", "\ngeheim", "{}:2: write a header a line"),
        ("headers", "X: geheim\rY: 1\x00", "write a header a line"),
        ("prices.toml", None, "prices file {}: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_clear_line(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, said: str
) -> None:
    file = folder / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["config", "check", str(folder / "agent.toml")])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert said.format(file) in err
    assert "geheim" not in err
    assert len(err.splitlines()) == 1


def test_a_file_that_is_no_certificate(folder: Path) -> None:
    (folder / "ca.pem").write_text("not one")
    (folder / "a.toml").write_text("[[server]]\nca_file = 'ca.pem'")
    with pytest.raises(UsageError, match="holds no certificate"):
        load(folder / "a.toml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff", "not a text in UTF-8"),
        (b"#" * 2**21, "more"),
    ],
)
def test_a_configuration_that_is_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "a.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        load(file)


def test_opentelemetrys_own_variables() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert parse("", environ=endpoint).export.otlp is None
    read = parse("[export.otlp]", environ=endpoint).export.otlp
    assert read is not None
    assert read.endpoint == "http://collector:4318"
    own = parse("[export.otlp]\nendpoint = 'http://own:1'", environ=endpoint).export.otlp
    assert own is not None
    assert own.endpoint == "http://own:1"
    path = parse("[export.otlp]\nendpoint = 'http://own:1/otlp/v1/'").export.otlp
    assert path is not None
    assert path.endpoint == "http://own:1/otlp/v1"
    with pytest.raises(UsageError, match=r"^OTEL_EXPORTER_OTLP_ENDPOINT: write an address"):
        parse("[export.otlp]", environ={"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"})
    assert parse("[export.otlp]", environ={"OTEL_SDK_DISABLED": "true"}).export.otlp is None


def test_headers_of_the_export_come_from_variable_and_file(folder: Path) -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=old,x-scope=a"}
    export = config.OtlpExport(headers_file=folder / "headers")
    assert config.otlp_headers(export, environ) == {
        "authorization": f"Bearer {TOKEN}", "x-scope": "a"
    }  # fmt: skip


# ------------------------------------------------------------------------------------- the example


def test_the_example_says_what_an_empty_file_says() -> None:
    assert load(EXAMPLE, {}) == Config()


def uncommented() -> dict[str, Any]:
    text = re.sub(r"^# (?=\[|[a-z_]+ = )", "", EXAMPLE.read_text("utf-8"), flags=re.MULTILINE)
    return tomllib.loads(text)


def missing_or_other(
    kind: type[msgspec.Struct], table: dict[str, Any], at: str = ""
) -> Iterator[str]:
    """The fields that the example lacks, and those that do not say their default."""
    for field in fields(kind):
        if field.key not in table:
            yield f"{at}{field.key} is not there"
        elif field.table is not None:
            inner = table[field.key][0] if field.is_list else table[field.key]
            yield from missing_or_other(field.table, inner, f"{at}{field.key}.")
        else:
            assert field.form is not None
            read = field.form.read(table[field.key], Path())
            if field.default not in (None, (), read) and f"{at}{field.key}" not in OWN:
                yield f"{at}{field.key} is {read}, and by default {field.default}"


OWN = ("agent.db", "server.name")  # their defaults depend on the machine and on the URL


def test_the_example_has_every_key_with_its_default() -> None:
    assert list(missing_or_other(Config, uncommented())) == []
