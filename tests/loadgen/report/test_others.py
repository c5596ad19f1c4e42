"""Files for users of AIPerf, GuideLLM and vLLM: by their definitions, in their shape.

Golden files are made anew with SERVEFIT_REFRESH_GOLDEN=1 and read as a diff. Their metrics were
found equal to what GuideLLM 0.8.1 compiles itself from the requests in the file, and their units to
AIPerf 0.13.0's; where those packages are installed the tests ask them again.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.model import (
    Level,
    Measurement,
    Requests,
    Run,
    Slo,
    Sweep,
    Target,
    Tokens,
    UsageError,
    Workload,
)
from loadgen.kept import Kept, kept
from loadgen.report.others import FORMATS, documents
from tests.bench import peers
from tests.loadgen.levels import row

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "exports"
HERE = Path(__file__).parent

# Two answers side by side, one that opened a connection, one of one token, one that failed in the
# middle, one that was never sent, one that was cut off at the end. Times in ms.
ROWS = [
    row(0, 0.0, 50.0, [10.0, 10.0, 20.0], end_ms=95.0),
    row(1, 1.0, 60.0, [12.0, 12.0, 12.0], sent_ms=6.0, connect_ms=4.0, end_ms=104.0),
    row(2, 95.0, 1000.0, [], end_ms=1095.0),
    row(3, 104.0, 50.0, [100.0], error="cut", end_ms=300.0),
    row(4, 300.0, 0.0, [], error="connect", sent_ms=None, ttft_ms=None, e2e_ms=None,
        ttfo_ms=None, prompt_tokens=None, output_tokens=0, chunks=0, gaps_ms=b"", end_ms=310.0),
    row(5, 1095.0, 40.0, [10.0], error="cancelled", end_ms=1200.0),
    row(6, 310.0, 40.0, [30.0] * 5, ttfo_ms=100.0, reasoning_tokens=3, end_ms=505.0),
]  # fmt: skip


def sweep(**fields: Any) -> Sweep:
    level = Level(
        concurrency=2,
        started_at="2026-03-11T09:12:00.000Z",
        duration_s=1.2,
        requests=Requests(4, 2, 1, {"cut": 1, "connect": 1}),
        tokens=Tokens(64, 12, 3, "usage"),
        measurement=Measurement(False, ["errors: failed_share 0.286 is above its bound 0.1"]),
    )
    run = Run("20260311-091200-ab12", "2026-03-11T09:12:00Z", "loadgen run URL", 7, "0.1", "host",
              simulated=True)  # fmt: skip
    whole = Sweep(
        run,
        Target("http://127.0.0.1:8000", "org/tiny", "vllm", "0.32.0"),
        Workload("chat", 16, 4, "closed"),
        [Slo("ttft", "p95", 60.0), Slo("tpot", "p95", 15.0)],
        [level],
    )
    return msgspec.structs.replace(whole, **fields)


def the_document(form: str, of: Sweep | None = None, requests: Kept | None = None) -> Any:
    [document] = documents(form, of or sweep(), [requests or kept(ROWS)]).values()
    return json.loads(msgspec.json.encode(document))


# ------------------------------------------------------------------------------------- golden files


@pytest.mark.parametrize("form", FORMATS)
def test_the_file_is_the_golden_one(form: str) -> None:
    """A member a line, so that a change shows where it is."""
    golden = GOLDEN / f"{form}.json"
    document = the_document(form)
    if os.environ.get("SERVEFIT_REFRESH_GOLDEN") == "1":
        golden.write_text(json.dumps(document).replace('}, "', '},\n"') + "\n")
    assert near(document, json.loads(golden.read_text()))


def near(a: Any, b: Any) -> bool:
    """Equal but for the last digits of a figure."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(near, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return bool(a == pytest.approx(b, rel=1e-9, abs=1e-9))
    return bool(a == b)


@pytest.mark.parametrize("form", FORMATS)
def test_no_file_hides_where_its_numbers_come_from(form: str) -> None:
    document = the_document(form)
    about = (document["benchmarks"][0] if form == "guidellm" else document)["servefit"]
    assert about["simulated"] is True
    assert about["valid"] is False
    assert about["reasons"] == ["errors: failed_share 0.286 is above its bound 0.1"]
    assert about["tokens_source"] == "usage"
    assert (about["requests"], about["requests_kept"], about["requests_cancelled"]) == (7, 7, 1)
    if form == "guidellm":
        labels = document["config"]["metadata"]["labels"]
        assert (labels["simulated"], labels["invalid_levels"]) == ("true", "1")


# --------------------------------------------------------------------------- definitions, by hand


def test_vllm_by_hand() -> None:
    found = the_document("vllm")
    assert (found["completed"], found["failed"], found["num_prompts"]) == (4, 2, 6)
    assert found["duration"] == pytest.approx(1.095)  # the request that we cut off is not in it
    assert found["ttfts"] == [0.05, 0.064, 1.0, 0.05, 0.0, 0.04]  # a connection's time included
    assert found["latencies"] == [0.09, 0.1, 1.0, 0.0, 0.0, 0.19]
    assert found["output_lens"] == [4, 4, 1, 0, 0, 6]
    assert found["errors"] == ["", "", "", "cut", "connect", ""]
    assert found["total_output_tokens"] == 15
    assert found["output_throughput"] == pytest.approx(15 / 1.095)
    assert found["total_token_throughput"] == pytest.approx((4 * 16 + 15) / 1.095)
    tpots = [40 / 3, 12.0, 30.0]
    assert found["mean_tpot_ms"] == pytest.approx(np.mean(tpots))
    assert found["std_tpot_ms"] == pytest.approx(np.std(tpots))
    assert found["p99_tpot_ms"] == pytest.approx(np.percentile(tpots, 99))
    assert found["median_itl_ms"] == 20.0  # of 10 10 20 12 12 12 30 30 30 30 30
    # one within TTFT ≤ 60 and TPOT ≤ 15: the second took 64 with its connection
    assert found["request_goodput"] == pytest.approx(1 / 1.095)
    assert found["max_concurrent_requests"] == 4
    assert found["max_output_tokens_per_s"] == 14.0
    assert (found["request_rate"], found["max_concurrency"], found["burstiness"]) == ("inf", 2, 1)


def test_aiperf_by_hand() -> None:
    found = the_document("aiperf")
    assert found["request_count"] == {"unit": "requests", "avg": 4.0}
    assert found["error_request_count"]["avg"] == 2.0
    itl = found["inter_token_latency"]
    assert (itl["unit"], itl["count"]) == ("ms", 3)
    assert itl["avg"] == pytest.approx(np.mean([40 / 3, 12.0, 30.0]))
    assert found["time_to_second_token"]["avg"] == pytest.approx(np.mean([10.0, 12.0, 30.0]))
    assert found["benchmark_duration"] == {"unit": "sec", "avg": pytest.approx(1.095)}
    assert found["request_throughput"]["avg"] == pytest.approx(4 / 1.095)
    assert found["output_token_throughput"]["avg"] == pytest.approx(15 / 1.095)
    assert found["output_token_throughput_per_user"]["max"] == pytest.approx(1e3 / 12)
    assert found["output_token_count"]["sum"] == 12.0  # without the three of reasoning
    assert found["time_to_first_output_token"]["max"] == 1000.0
    assert found["good_request_count"]["avg"] == 1.0  # one token alone has no ITL, and is no good
    kinds = {each["error_details"]["type"]: each["count"] for each in found["error_summary"]}
    assert kinds == {"cut": 1, "connect": 1}
    assert "reasoning_token_count" in found
    assert "aiperf_version" not in found


def test_guidellm_by_hand() -> None:
    metrics = the_document("guidellm")["benchmarks"][0]["metrics"]
    totals = {"successful": 4, "errored": 2, "incomplete": 1, "total": 7}
    assert metrics["request_totals"] == totals
    tpot = metrics["time_per_output_token_ms"]["successful"]
    assert tpot["count"] == 15  # weighted by tokens, the first included
    assert tpot["mean"] == pytest.approx((90 + 100 + 1000 + 190) / 15)
    itl = metrics["inter_token_latency_ms"]["successful"]
    assert itl["mean"] == pytest.approx((40 + 36 + 150) / 11)
    latency = metrics["request_latency"]["successful"]
    assert latency["max"] == pytest.approx(1.0)
    assert latency["min"] == pytest.approx(0.095)  # to the reply's end, not its last token
    assert metrics["requests_per_second"]["successful"]["mean"] == pytest.approx(4 / 1.2, rel=1e-3)
    assert metrics["slo_attainment"] == pytest.approx(
        1 / 5
    )  # of three answers that have both, and two failures
    busy = (95 + 103 + 1000 + 196 + 10 + 105 + 195) / 1200
    assert metrics["request_concurrency"]["total"]["mean"] == pytest.approx(busy, rel=0.01)


# -------------------------------------------------------------------------------- what is not there


def test_what_was_not_measured_is_null_or_left_out() -> None:
    rows = [row(i, 0.0, 1.0, [], ttft_ms=None, ttfo_ms=None, e2e_ms=80.0, end_ms=80.0, chunks=0,
                gaps_ms=b"", prompt_tokens=None, output_tokens=5) for i in range(3)]  # fmt: skip
    plain, requests = sweep(slo=[]), kept(rows)
    vllm = the_document("vllm", plain, requests)
    for name in ("total_input_tokens", "total_token_throughput", "mean_ttft_ms", "p99_tpot_ms",
                 "median_itl_ms", "request_goodput", "max_output_tokens_per_s"):  # fmt: skip
        assert vllm[name] is None, name
    assert vllm["mean_e2el_ms"] == 80.0
    aiperf = the_document("aiperf", plain, requests)
    for name in ("time_to_first_token", "inter_token_latency", "input_sequence_length", "goodput",
                 "total_isl", "reasoning_token_count", "total_token_throughput"):  # fmt: skip
        assert name not in aiperf, name
    assert aiperf["request_latency"]["avg"] == 80.0
    guidellm = the_document("guidellm", plain, requests)["benchmarks"][0]
    assert guidellm["requests"]["successful"][0]["time_to_first_token_ms"] is None
    assert guidellm["metrics"]["text"]["tokens"]["input"] is None
    assert guidellm["metrics"]["slo_attainment"] is None


@pytest.mark.parametrize("form", FORMATS)
def test_a_level_in_which_nothing_was_answered(form: str) -> None:
    document = the_document(form, requests=kept([ROWS[4]]))
    assert "NaN" not in json.dumps(document)


@pytest.mark.parametrize("form", FORMATS)
def test_an_slo_that_the_tool_cannot_say_gives_no_goodput(form: str) -> None:
    document = the_document(form, sweep(slo=[Slo("itl", "p95", 50.0)]))
    if form == "vllm":
        assert document["request_goodput"] is None
    elif form == "aiperf":
        assert "goodput" not in document
    else:
        assert document["benchmarks"][0]["metrics"]["request_goodput"] is None


@pytest.mark.parametrize("form", FORMATS)
def test_a_level_without_requests_is_refused(form: str) -> None:
    with pytest.raises(UsageError, match="the store has no requests of level 1"):
        documents(form, sweep(), [kept([])])


def test_files_are_named_as_the_tools_name_them() -> None:
    held, again = sweep().levels[0], sweep().levels[0]
    open_loop = msgspec.structs.replace(held, mode="rate", concurrency=None, offered_rps=2.5)
    three = sweep(levels=[held, again, open_loop])
    requests = [kept(ROWS)] * 3
    assert list(documents("aiperf", three, requests)) == [
        "concurrency_2/profile_export_aiperf.json",
        "concurrency_2/profile_runs/run_0002/profile_export_aiperf.json",
        "request_rate_2.5/profile_export_aiperf.json",
    ]
    assert list(documents("vllm", three, requests)) == [
        "openai-chat-infqps-concurrency2-tiny-20260311-091200.json",
        "openai-chat-infqps-concurrency2-tiny-20260311-091200-2.json",
        "openai-chat-2.5qps-tiny-20260311-091200.json",
    ]
    assert list(documents("guidellm", three, requests)) == ["benchmarks.json"]


# ----------------------------------------------------------------------------- the tools themselves


def peer(package: str) -> str:
    """The interpreter that has another tool; skips where it is not installed."""
    for found in peers.find():
        if package in found.peer.distributions:
            return str(found.python)
    pytest.skip(f"needs {package}: make peers")


def ask(python: str, script: str, document: Any, tmp_path: Path) -> str:
    """What the tool's own code says of a file: its last line."""
    file = tmp_path / "file.json"
    file.write_text(json.dumps(document))
    done = subprocess.run(
        [python, str(HERE / script), str(file)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("mode", ["concurrency", "rate"])
def test_guidellm_reads_it_and_works_out_the_same(mode: str, tmp_path: Path) -> None:
    level = sweep().levels[0]
    if mode == "rate":
        level = msgspec.structs.replace(level, mode="rate", concurrency=None, offered_rps=5.0)
    document = the_document("guidellm", sweep(levels=[level]))
    assert ask(peer("guidellm"), "in_guidellm.py", document, tmp_path) == "equal"


def test_aiperf_reads_it_in_its_own_units(tmp_path: Path) -> None:
    assert ask(peer("aiperf"), "in_aiperf.py", the_document("aiperf"), tmp_path) == "equal"


def test_vllm_works_out_the_same(vllm_python: str, tmp_path: Path) -> None:
    assert ask(vllm_python, "in_vllm.py", the_document("vllm"), tmp_path) == "equal"
