"""The page for Prometheus: read back by real parsers, whatever stands in the labels."""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.exporters import Batch
from agent.exporters.prometheus import CONTENT_TYPE, family, negotiate, page, sample_name
from agent.metrics import CATALOGUE
from agent.model import Reading
from tests.agent.exporters.samples import gpus, histogram, server
from tests.conftest import VictoriaMetrics

GOLDEN = Path(__file__).parents[2] / "golden" / "exporters"
HOSTILE = 'a"b\\c\nd{}\ud800 # EOF\n# TYPE x counter\r'
BATCHES = [
    server(42),
    server(7, source="embed"),
    Batch("bare", [r for r in histogram("queue_seconds", 0, (1, 2, 3), 0.5) if "_b" not in r.name]),
    gpus(42),
    gpus(42, "GPU-2"),
]


def everything() -> list[Batch]:
    """Every series of the catalogue once, each with a hostile label."""
    readings = [
        Reading(0, entry.name, 3.0, (("le", "+Inf"),) if entry.name.endswith("_bucket") else ())
        for entry in CATALOGUE.values()
    ]
    return [Batch(HOSTILE, readings, ((HOSTILE, "1"), ("9lives", ""), ("__name__", "evil")))]


@pytest.mark.parametrize(("form", "name"), [("text", "page.txt"), ("openmetrics", "page.om")])
def test_the_page_is_the_golden_one(form: Any, name: str) -> None:
    golden = GOLDEN / name
    if os.environ.get("SERVEFIT_REFRESH_GOLDEN") == "1":
        golden.write_bytes(page(BATCHES, form))
    assert page(BATCHES, form) == golden.read_bytes()


# Prints what prometheus_client makes of a page: [family, type, unit, [[name, labels, value], …]].
_READ = """
import json, sys
form, text = sys.argv[1], sys.stdin.buffer.read().decode()
if form == "text":
    from prometheus_client.parser import text_string_to_metric_families as parse
else:
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
print(json.dumps([
    [f.name, f.type, f.unit, [[s.name, s.labels, str(s.value)] for s in f.samples]]
    for f in parse(text)
]))
"""


def read_back(python: str, form: str, text: bytes) -> list[Any]:
    """The page as prometheus_client reads it; it comes with vLLM."""
    done = subprocess.run(
        [python, "-c", _READ, form], input=text, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("form", ["text", "openmetrics"])
def test_prometheus_client_reads_what_was_written(vllm_python: str, form: Any) -> None:
    families = {f[0]: f for f in read_back(vllm_python, form, page(BATCHES, form))}
    ttft = families["servefit_ttft_seconds"]
    assert ttft[1] == "histogram"
    counts = {
        (s[1]["source"], s[1]["le"]): float(s[2]) for s in ttft[3] if s[0].endswith("_bucket")
    }
    assert counts["chat", "0.5"] == 84
    assert counts["embed", "+Inf"] == 21
    assert families["servefit_queue_seconds"][1] == "summary"
    tokens = families["servefit_output_tokens"]
    assert [s[0] for s in tokens[3]] == ["servefit_output_tokens_total"] * 2
    power = families["servefit_gpu_power_w"]
    assert [(s[1]["gpu"], s[2]) for s in power[3]] == [("GPU-1", "350.5"), ("GPU-2", "350.5")]
    if form == "openmetrics":
        assert (ttft[2], power[2]) == ("seconds", "w")


@pytest.mark.parametrize("form", ["text", "openmetrics"])
def test_all_of_the_catalogue_with_hostile_names_is_still_a_page(
    vllm_python: str, form: Any
) -> None:
    families = read_back(vllm_python, form, page(everything(), form))
    assert {f[0] for f in families} == {family(name) for name in CATALOGUE}
    for _, _, _, samples in families:
        for _, labels, value in samples:
            assert float(value) == 3.0
            assert labels["source"] == HOSTILE.replace("\ud800", "?")
            assert set(labels) - {"le"} == {"source", "_9lives", "label__name__"} | {
                name for name in labels if name.startswith("a_b")
            }


def test_victoria_metrics_takes_the_page(victoria_metrics: VictoriaMetrics) -> None:
    run = secrets.token_hex(6)
    batch = Batch('q"\\\n', [Reading(0, "kv_usage_ratio", 0.25)], (("run", run),))
    at_ms = int(time.time() * 1000) - 60_000  # what is newer than a second is not exported yet
    request = urllib.request.Request(
        f"{victoria_metrics.url}/api/v1/import/prometheus?timestamp={at_ms}",
        data=page([batch]),
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 204
    [series] = victoria_metrics.export(f'{{run="{run}"}}')
    assert series["metric"] == {
        "__name__": "servefit_kv_usage_ratio",
        "source": 'q"\\\n',
        "run": run,
    }
    assert series["values"] == [0.25]


def test_a_series_read_twice_stands_there_once_with_its_last_value() -> None:
    batch = Batch("s", [Reading(0, "requests_running", 1.0), Reading(1, "requests_running", 2.0)])
    lines = page([batch]).decode().splitlines()
    assert lines[2:] == ['servefit_requests_running{source="s"} 2']


def test_a_histogram_without_buckets_beside_one_with() -> None:
    bare = [r for r in histogram("ttft_seconds", 0, (1, 2, 3), 0.5) if "_bucket" not in r.name]
    text = page([server(1), Batch("bare", bare)]).decode()
    assert 'servefit_ttft_seconds_bucket{le="+Inf",source="bare"} 3' in text


def test_names_are_those_of_the_catalogue_with_total_behind_counters() -> None:
    assert sample_name("gpu_energy_j") == "servefit_gpu_energy_j_total"
    assert sample_name("output_tokens_total") == "servefit_output_tokens_total"
    assert sample_name("ttft_seconds_sum") == "servefit_ttft_seconds_sum"
    assert sample_name("kv_usage_ratio") == "servefit_kv_usage_ratio"
    names = [sample_name(name) for name in CATALOGUE]
    assert len(set(names)) == len(names)


def test_an_empty_page_is_a_page(vllm_python: str) -> None:
    assert page([], "openmetrics") == b"# EOF\n"
    assert read_back(vllm_python, "text", page([])) == []


@given(st.floats() | st.integers(0, 2**60).map(float))
def test_a_number_comes_back_as_it_was(value: float) -> None:
    line = page([Batch("s", [Reading(0, "requests_running", value)])]).decode().splitlines()[-1]
    read = float(line.rpartition(" ")[2])
    assert read == value or (math.isnan(read) and math.isnan(value))


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_label_is_one_line_whatever_is_in_it(name: str, value: str) -> None:
    batch = Batch("s", [Reading(0, "requests_running", 1.0)], ((name, value),))
    assert page([batch]).count(b"\n") == 3


PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, "text"),
        ("", "text"),
        ("*/*", "text"),
        (PROMETHEUS_3, "openmetrics"),
        ("application/openmetrics-text", "openmetrics"),
        ("text/plain, application/openmetrics-text;q=0.5", "text"),
        ("APPLICATION/OpenMetrics-Text; Q=0.9, text/plain;q=0.1", "openmetrics"),
        ("application/openmetrics-text;q=nonsense", "text"),
        ("application/openmetrics-text;q=nan", "text"),
        (",;=,q", "text"),
    ],
)
def test_the_format_is_negotiated(accept: str | None, form: str) -> None:
    assert negotiate(accept) == form
    assert negotiate(accept) in CONTENT_TYPE
