"""What OpenTelemetry's own variables change about the delivery."""

from __future__ import annotations

import pytest

from agent.exporters.delivery import EVERY_S, every_s, resource, url_of
from agent.model import UsageError

ENDPOINT = "http://collector:4318"


@pytest.mark.parametrize(
    ("said", "expected"), [("", EVERY_S), ("60000", 60.0), ("5", 0.1), ("often", EVERY_S)]
)
def test_how_often(said: str, expected: float) -> None:
    assert every_s({"OTEL_METRIC_EXPORT_INTERVAL": said}) == expected


def test_where_each_kind_goes() -> None:
    environ = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://vm:8428/opentelemetry/v1/metrics"}
    assert url_of(ENDPOINT, "metrics", environ) == "http://vm:8428/opentelemetry/v1/metrics"
    assert url_of(ENDPOINT, "traces", environ) == "http://collector:4318/v1/traces"
    with pytest.raises(UsageError, match="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        url_of(ENDPOINT, "traces", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "collector"})


def test_whose_readings() -> None:
    environ = {
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=a%20b,broken",
        "OTEL_SERVICE_NAME": "x",
    }
    said = resource(environ)
    assert said["deployment.environment"] == "a b"
    assert said["service.name"] == "x"
    assert "broken" not in said
    assert said["host.name"]
