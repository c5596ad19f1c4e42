"""What people call findings and reasons: one table for report, card, pictures and page.

Codes are for scripts and stay as they are; these are for eyes, and short enough for a label.
"""

from __future__ import annotations

import json

# The findings in order of precedence, each with the tone of its colour.
FINDINGS = {
    "INVALID_MEASUREMENT": ("Invalid measurement", "bad"),
    "IDLE": ("Idle", "warn"),
    "INFEASIBLE_SLO": ("SLO out of reach", "bad"),
    "UNDER_SIZED": ("Too small", "bad"),
    "OVER_SIZED": ("Too big", "warn"),
    "OVER_OFF_PEAK": ("Too big off peak", "warn"),
    "RIGHT_SIZED": ("Right size", "good"),
    "BORDERLINE": ("Borderline", "warn"),
    "INSUFFICIENT_DATA": ("Not enough data", "neutral"),
    "CAPACITY_ONLY": ("Capacity, no demand known", "info"),
}

REASONS = {
    "KV_MEMORY": "KV cache memory",
    "MEM_BANDWIDTH": "memory bandwidth",
    "COMPUTE_PREFILL": "prefill compute",
    "ADMISSION_CAP": "admission cap",
    "INTERCONNECT": "interconnect",
    "CLIENT_LIMITED": "the client itself",
    "BURST_ONLY": "bursts only",
    "DIURNAL_PEAK": "daily peak",
    "HEADROOM": "headroom",
    "OFF_PEAK": "little used off peak",
    "IDLE": "hardly ever busy",
    "WEIGHTS_DONT_FIT": "weights do not fit",
    "PREFIX_CACHE_DEPENDENT": "depends on the prefix cache",
    "POWER_CAPPED": "power cap",
    "THROTTLED": "throttled clocks",
    "RETRY_INFLATED": "inflated by retries",
    "SLO_BROKEN_ALONE": "SLO broken by one request alone",
    "SLO_BROKEN_IN_PRODUCTION": "SLO broken in production",
    "FOREIGN_TRAFFIC": "foreign traffic",
    "FINGERPRINT_DIFFERS": "settings differ",
    "TELEMETRY_INCONSISTENT": "telemetry contradicts itself",
    "ERRORS": "failed requests",
    "UNSTEADY": "not steady",
    "INVALID": "not valid",
    "TRAINING_CLASS_FOR_PERSONAL": "training-class GPU for personal use",
    "PREDICTION_SCORED": "a prediction, scored",
    "MISMATCHED": "mismatched: one part binds, another idles",
}


def script() -> str:
    """The same for a page, as the script that sets `window.servefitWords`."""
    words = json.dumps({"findings": FINDINGS, "reasons": REASONS}, separators=(",", ":"))
    return f'"use strict";\nwindow.servefitWords = {words};\n'
