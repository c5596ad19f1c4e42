"""Verdicts, curves, targets and GPUs as series of the catalogue."""

from __future__ import annotations

import math
from collections.abc import Iterable

from agent.exporters import Known, known_batch
from agent.exporters.concluded import CONFIDENCE, of_curve, of_server, of_verdict
from agent.exporters.prometheus import page
from agent.metrics import CATALOGUE
from agent.model import (
    Confidence,
    Level,
    Measurement,
    Ratio,
    Run,
    ServerView,
    Slo,
    Stats,
    Sweep,
    Target,
    Verdict,
)

VERDICT = Verdict(
    finding="UNDER_SIZED",
    summary="too small",
    confidence=Confidence("medium", "a week"),
    ratio=Ratio(1.4, 1.2, None),
    capacity={"unit": "concurrency", "value": 20.0, "lo": 16, "hi": 24.0, "basis": "slo"},
    energy={"j_per_output_token": 0.8, "idle_w": 70.0},
)


def level(concurrency: int, rate: float, is_valid: bool = True) -> Level:
    return Level(
        concurrency=concurrency,
        output_tokens_per_s=rate,
        output_tokens_per_s_ci95=(0.875 * rate, 1.125 * rate),
        request_throughput=rate / 100,
        ttft_ms=Stats(p95=250.0, n=100),
        itl_ms=Stats(p95=20.0, n=100),
        measurement=Measurement(valid=is_valid, reasons=[]),
        server=ServerView(kv_usage_mean=0.25),
    )


def lines(known: Iterable[Known]) -> set[str]:
    text = page([known_batch(7, known)]).decode()
    return {line for line in text.splitlines() if not line.startswith("#")}


def test_a_verdict_says_what_it_says_and_nothing_else() -> None:
    assert lines(of_verdict("chat", VERDICT, 1.8e9)) == {
        'servefit_assessment_unix_s{source="chat"} 1800000000',
        'servefit_assessment_finding{confidence="medium",finding="UNDER_SIZED",source="chat"} 1',
        'servefit_assessment_confidence{source="chat"} 2',
        'servefit_assessment_demand_ratio{source="chat"} 1.4',
        'servefit_assessment_demand_lo_ratio{source="chat"} 1.2',
        'servefit_assessment_capacity_requests{source="chat"} 20',
        'servefit_assessment_capacity_lo_requests{source="chat"} 16',
        'servefit_assessment_capacity_hi_requests{source="chat"} 24',
        'servefit_assessment_energy_j_per_output_token{source="chat"} 0.8',
    }


def test_a_verdict_without_a_number_is_its_finding() -> None:
    nothing = Verdict("INSUFFICIENT_DATA", "nothing seen", Confidence("none", "no data"))
    found = of_verdict("service:chat", nothing, 5.0)
    assert [one.name for one in found] == [
        "assessment_unix_s",
        "assessment_finding",
        "assessment_confidence",
    ]
    assert found[2].value == 0
    assert set(CONFIDENCE) == {"none", "low", "medium", "high"}


def test_a_capacity_in_requests_a_second_is_another_series() -> None:
    verdict = Verdict(
        "RIGHT_SIZED", "fits", Confidence("low", ""), capacity={"unit": "rps", "value": 2.5}
    )
    found = {one.name: one.value for one in of_verdict("chat", verdict, 5.0)}
    assert found["assessment_capacity_requests_per_s"] == 2.5
    assert "assessment_capacity_requests" not in found


def test_a_curve_is_its_valid_loads() -> None:
    sweep = Sweep(
        run=Run(id="r1", simulated=True),
        target=Target(model='ti"ny'),
        levels=[level(4, 512.0), level(1, 100.0), level(1, 120.0), level(9, 9.0, is_valid=False)],
    )
    found = lines(of_curve("chat", sweep, 5.0))
    assert (
        'servefit_curve_received_unix_s{model="ti\\"ny",run="r1",simulated="true",source="chat"} 5'
    ) in found
    assert 'servefit_curve_output_tokens_per_s{concurrency="4",source="chat"} 512' in found
    assert 'servefit_curve_output_tokens_per_s{concurrency="1",source="chat"} 110' in found
    assert 'servefit_curve_output_lo_tokens_per_s{concurrency="4",source="chat"} 448' in found
    assert 'servefit_curve_ttft_p95_s{concurrency="4",source="chat"} 0.25' in found
    assert 'servefit_curve_itl_p95_s{concurrency="4",source="chat"} 0.02' in found
    assert 'servefit_curve_kv_usage_ratio{concurrency="4",source="chat"} 0.25' in found
    assert not any('concurrency="9"' in line for line in found)
    assert not any("curve_energy" in line for line in found)  # nobody measured it


def test_an_open_loop_has_its_rate_and_embeddings_no_tokens() -> None:
    levels = [Level(mode="rate", offered_rps=2.5, request_throughput=2.4)]
    found = of_curve("chat", Sweep(levels=levels), 5.0)
    names = {one.name for one in found if ("offered_rps", "2.5") in one.labels}
    assert names == {"curve_requests_per_s"}


def test_a_servers_gpus_and_targets() -> None:
    found = of_server("chat", ["GPU-1", "GPU-2"], [Slo("ttft", "p95", 500.0)])
    assert lines(found) == {
        'servefit_server_gpu{gpu="GPU-1",source="chat"} 1',
        'servefit_server_gpu{gpu="GPU-2",source="chat"} 1',
        'servefit_slo_bound_s{metric="ttft",source="chat",statistic="p95"} 0.5',
    }


def test_all_of_it_is_in_the_catalogue_and_finite() -> None:
    infinite = Verdict(
        "X", "", Confidence("low", ""), ratio=Ratio(math.inf), capacity={"unit": "pages"}
    )
    known = [
        *of_server("a", ["G"], [Slo("itl", "max", 1.0)]),
        *of_verdict("a", VERDICT, 1.0),
        *of_verdict("a", infinite, 1.0),
        *of_curve("a", Sweep(levels=[level(1, 5.0)]), 1.0),
    ]
    assert {one.name for one in known} <= CATALOGUE.keys()
    assert all(math.isfinite(one.value) for one in known)
    assert known_batch(7, known).source == "assessment"
