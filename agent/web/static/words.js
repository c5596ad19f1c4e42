/* What people call findings, each with the tone of its colour, and reasons: JSON behind the name. */
"use strict";
window.servefitWords = {
  "findings": {
    "INVALID_MEASUREMENT": ["Invalid measurement", "bad"],
    "IDLE": ["Idle", "warn"],
    "INFEASIBLE_SLO": ["SLO out of reach", "bad"],
    "UNDER_SIZED": ["Too small", "bad"],
    "OVER_SIZED": ["Too big", "warn"],
    "OVER_OFF_PEAK": ["Too big off peak", "warn"],
    "RIGHT_SIZED": ["Right size", "good"],
    "BORDERLINE": ["Borderline", "warn"],
    "INSUFFICIENT_DATA": ["Not enough data", "neutral"],
    "CAPACITY_ONLY": ["Capacity, no demand known", "info"]
  },
  "reasons": {
    "KV_MEMORY": "KV cache memory",
    "MEM_BANDWIDTH": "memory bandwidth",
    "COMPUTE_PREFILL": "prefill compute",
    "ADMISSION_CAP": "admission cap",
    "INTERCONNECT": "interconnect",
    "CLIENT_LIMITED": "the client itself",
    "BURST_ONLY": "bursts only",
    "DIURNAL_PEAK": "daily peak",
    "WEIGHTS_DONT_FIT": "weights do not fit",
    "PREFIX_CACHE_DEPENDENT": "depends on the prefix cache",
    "POWER_CAPPED": "power cap",
    "THROTTLED": "throttled clocks",
    "RETRY_INFLATED": "inflated by retries",
    "SLO_BROKEN_ALONE": "SLO broken by one request alone",
    "FOREIGN_TRAFFIC": "foreign traffic",
    "ERRORS": "failed requests",
    "UNSTEADY": "not steady",
    "INVALID": "not valid",
    "TRAINING_CLASS_FOR_PERSONAL": "training-class GPU for personal use"
  }
};
