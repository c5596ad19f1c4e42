"""Runs in AIPerf's interpreter: its own model loads the file; units are those of its metrics."""

from __future__ import annotations

import json
import sys

from aiperf.common.models.export_models import JsonExportData
from aiperf.metrics.metric_registry import MetricRegistry

with open(sys.argv[1]) as file:
    text = file.read()
JsonExportData.model_validate_json(text)
wrong = []
for tag, value in json.loads(text).items():
    if isinstance(value, dict) and "unit" in value:
        metric = MetricRegistry.get_class(tag)  # raises for a metric that AIPerf does not know
        unit = str(metric.display_unit or metric.unit)
        if unit != value["unit"]:
            wrong.append(f"{tag}: {value['unit']}, and AIPerf has {unit}")
print("\n".join(wrong) or "equal")
