"""Writes the Grafana dashboards beside it: `python dashboards/generate.py`, or `--check` them.

An expression names series as the catalogue does, with @ in front: `@kv_usage_ratio` becomes
`servefit_kv_usage_ratio{…}`, as on the agent's /metrics page, with the variables of the dashboard
that choose among its series. A name that is not in the catalogue is a KeyError here, not an empty
panel there. The names are those of the page that Prometheus scrapes, not those of OTLP.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from agent.exporters.prometheus import sample_name

HERE = Path(__file__).parent
WIDTH = 24
SCHEMA_VERSION = 39  # Grafana 10.4 and newer, which bring an older dashboard up to theirs
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]

# -------------------------------------------------------------------------------------- expressions

_SERIES = re.compile(r"@(\w+)(?:\{([^{}]*)\})?")

# Which variables choose among the series of a group, by how their canonical names begin.
_CHOSEN_BY = {
    "gpu_": ("instance", "gpu"),
    "host_": ("instance",),
    "server_process_": ("instance",),
    "sampler_": ("instance",),
    "agent_": ("instance",),
    "server_gpu": ("instance", "server"),
    "slo_": ("instance", "server"),
    "assessment_": ("instance", "server"),
    "curve_": ("instance", "server"),
    "": ("instance", "model", "server"),  # whatever comes from a server's own page
}
_LABEL = {"server": "source"}  # of the variable of another name


def expand(text: str, variables: Iterable[str]) -> str:
    """The expression in Prometheus' names, narrowed by those `variables` that its series have."""
    known = set(variables)

    def series(found: re.Match[str]) -> str:
        canonical, more = found[1], found[2]
        group = next(chosen for start, chosen in _CHOSEN_BY.items() if canonical.startswith(start))
        matchers = [f'{_LABEL.get(one, one)}=~"${one}"' for one in group if one in known]
        matchers += [more] if more else []
        return f"{sample_name(canonical)}{{{','.join(matchers)}}}"

    return _SERIES.sub(series, text)


def rate(counter: str) -> str:
    return f"rate(@{counter}[$__rate_interval])"


def quantile(q: float, histogram: str, by: str = "source") -> str:
    buckets = f"sum by (le, {by}) ({rate(f'{histogram}_bucket')})"
    return f"histogram_quantile({q:g}, {buckets})"


def mean(histogram: str, by: str = "source") -> str:
    total, count = (f"sum by ({by}) ({rate(histogram + part)})" for part in ("_sum", "_count"))
    return f"{total} / ({count} > 0)"


# ------------------------------------------------------------------------------------------- panels


class Target(NamedTuple):
    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel; `more` goes over what its kind brings."""

    title: str
    unit: str
    targets: Sequence[Target]
    about: str = ""
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    more: Json = field(default_factory=dict)


def each(expr: str, legend: str) -> list[Target]:
    return [Target(expr, legend)]


def quantiles(histogram: str, *qs: float) -> list[Target]:
    return [Target(quantile(q, histogram), f"{{{{source}}}} p{100 * q:g}") for q in qs]


def with_bound(histogram: str, metric: str) -> list[Target]:
    """Percentiles, and the targets declared for them."""
    bound = f'max by (source, statistic) (@slo_bound_s{{metric="{metric}"}})'
    return [
        *quantiles(histogram, 0.5, 0.95, 0.99),
        Target(bound, "{{source}} bound of {{statistic}}"),
    ]


def thresholds(*steps: tuple[str, float | None]) -> Json:
    """A colour from each value on; the first from everywhere."""
    return {"mode": "absolute", "steps": [{"color": color, "value": at} for color, at in steps]}


LINE = {"custom": {"thresholdsStyle": {"mode": "line"}}}
SHARE = {"min": 0, "max": 1}
LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
MANY = {"mode": "multi", "sort": "desc"}
REDUCED = {"calcs": ["lastNotNull"], "fields": "", "values": False}

# What each kind of panel is by itself; `instant` panels show the newest value of each series.
_KINDS: dict[str, Json] = {
    "timeseries": {
        "fieldConfig": {
            "defaults": {"min": 0, "custom": {"fillOpacity": 8, "showPoints": "auto"}}
        },
        "options": {"legend": LEGEND, "tooltip": MANY},
    },
    "trend": {
        "fieldConfig": {
            "defaults": {"min": 0, "custom": {"lineWidth": 2, "showPoints": "always"}}
        },
        "options": {"legend": LEGEND, "tooltip": MANY},
    },
    "stat": {
        "fieldConfig": {"defaults": {}},
        "options": {
            "reduceOptions": REDUCED,
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "auto",
        },
    },
    "table": {
        "fieldConfig": {"defaults": {"custom": {"align": "auto", "cellOptions": {"type": "auto"}}}},
        "options": {"showHeader": True, "cellHeight": "sm"},
    },
    "heatmap": {
        "fieldConfig": {"defaults": {}},
        "options": {
            "calculate": False,
            "cellGap": 1,
            "color": {
                "mode": "scheme", "scheme": "Oranges", "fill": "dark-orange", "exponent": 0.5,
                "steps": 64, "reverse": False,
            },
            "yAxis": {"unit": "s", "axisPlacement": "left"},
            "legend": {"show": True},
            "tooltip": {"mode": "single", "yHistogram": False},
        },
    },
}  # fmt: skip


def render(panel: Panel, number: int, place: Json, variables: Iterable[str]) -> Json:
    made = _over(_KINDS[panel.kind], panel.more)
    made["fieldConfig"] = _over(
        {"defaults": {"unit": panel.unit}, "overrides": []}, made["fieldConfig"]
    )
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [
            _target(target, letter, panel.kind, variables)
            for target, letter in zip(panel.targets, "ABCDEFGHIJKLM", strict=False)
        ],
        **made,
    }


def _target(target: Target, letter: str, kind: str, variables: Iterable[str]) -> Json:
    now = kind in ("table", "trend")
    form = "table" if now else "heatmap" if kind == "heatmap" else "time_series"
    return {
        "refId": letter,
        "datasource": DATASOURCE,
        "expr": expand(target.expr, variables),
        "legendFormat": target.legend or "__auto",
        "format": form,
        "instant": now,
        "range": not now,
    }


def _over(base: Json, more: Json) -> Json:
    """`more` laid over `base`, object by object."""
    merged = dict(base)
    for key, value in more.items():
        under = merged.get(key)
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[key] = _over(under, value) if both else value  # type: ignore[arg-type]
    return merged


def named(name: str, title: str, unit: str, **more: Any) -> Json:
    """How a table's column, or a curve, is shown."""
    properties = {"displayName": title, "unit": unit, **more}
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": id_, "value": value} for id_, value in properties.items()],
    }


def merged(*hidden: str) -> list[Json]:
    """The instant values of all targets as one table, a row for each set of labels."""
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": dict.fromkeys(("Time", *hidden), True)}},
    ]


# --------------------------------------------------------------------------------------- dashboards


class Variable(NamedTuple):
    name: str
    label: str
    of: str  # a series that has the label
    by: str  # the label
    several: bool = True


INSTANCE = Variable("instance", "Agent", "agent_start_unix_s", "instance")
MODEL = Variable("model", "Model", "requests_running", "model")
SERVER = Variable("server", "Server", "requests_running", "source")
JUDGED = Variable("server", "Server or service", "assessment_unix_s", "source")
SWEPT = Variable("server", "Server", "curve_received_unix_s", "source", several=False)
DEVICE = Variable("gpu", "GPU", "gpu_memory_used_bytes", "gpu")


class Typed(NamedTuple):
    """A number that the reader writes."""

    name: str
    label: str
    value: str


Row = tuple[str, Sequence[Panel]]


class Dashboard(NamedTuple):
    name: str
    title: str
    about: str
    variables: Sequence[Variable | Typed]
    rows: Sequence[Row]
    folded: frozenset[str] = frozenset()  # rows that ask for nothing until they are opened


def variables_of(dashboard: Dashboard) -> Iterator[Json]:
    yield {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "refresh": 1,
    }
    before: list[str] = []
    for one in dashboard.variables:
        if isinstance(one, Typed):
            now = {"text": one.value, "value": one.value}
            yield {"name": one.name, "label": one.label, "type": "textbox", "query": one.value,
                   "current": now, "options": [{**now, "selected": True}]}  # fmt: skip
            continue
        series = expand(f"@{one.of}", before)
        query = f"label_values({series}, {one.by})"
        every = {
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }
        yield {
            "name": one.name,
            "label": one.label,
            "type": "query",
            "datasource": DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": "variable"},
            "refresh": 2,  # when the time range changes
            "sort": 1,
            "multi": one.several,
            "includeAll": one.several,
            **(every if one.several else {"current": {}}),
        }
        before.append(one.name)


def render_all(dashboard: Dashboard) -> Json:
    chosen = [one.name for one in dashboard.variables if isinstance(one, Variable)]
    return {
        "id": None,
        "uid": f"servefit-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["servefit"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "templating": {"list": list(variables_of(dashboard))},
        "annotations": {"list": []},
        "links": [
            {"type": "dashboards", "tags": ["servefit"], "title": "servefit", "asDropdown": True,
             "includeVars": True, "keepTime": True, "icon": "external link"},
        ],
        "panels": _placed(dashboard, chosen),
    }  # fmt: skip


def _placed(dashboard: Dashboard, variables: Sequence[str]) -> list[Json]:
    """From left to right and row by row, none over another; a folded row holds its own."""
    placed: list[Json] = []
    number, top = 1, 0
    for title, panels in dashboard.rows:
        row: Json = {"id": number, "type": "row", "title": title, "panels": [],
                     "collapsed": title in dashboard.folded,
                     "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1}}  # fmt: skip
        placed.append(row)
        into = row["panels"] if row["collapsed"] else placed
        number, top, left, height = number + 1, top + 1, 0, 0
        for panel in panels:
            if left + panel.width > WIDTH:
                top, left, height = top + height, 0, 0
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            into.append(render(panel, number, place, variables))
            number, left, height = number + 1, left + panel.width, max(height, panel.height)
        top += height
    return placed


# ------------------------------------------------------------------------------------------ content

IN_FLIGHT = (
    "(sum by (instance, source) (@requests_running)"
    " + sum by (instance, source) (@requests_waiting))"
)
CAPACITY = "max by (instance, source) (@assessment_capacity_requests)"
TOKENS = f"sum by (instance, source) ({rate('output_tokens_total')})"
# A GPU that serves two servers is in both their sums; its own dashboard has it once.
WATTS = (
    "sum by (instance, source) (max by (instance, gpu, source) (@server_gpu) * on (instance, gpu)"
    f" group_left () sum by (instance, gpu) ({rate('gpu_energy_j')}))"
)
GPUS = "count by (instance, source) (@server_gpu)"
COST = f"($gpu_hour * {GPUS} / 3600 + $kwh * {WATTS} / 3.6e6) / ({TOKENS} > 0) * 1e6"


def newest(series: str) -> Target:
    return Target(f"max by (instance, source) (@{series})")


VERDICTS = Panel(
    "Newest verdicts",
    "none",
    [
        Target("max by (instance, source, finding, confidence) (@assessment_finding)"),
        newest("assessment_demand_ratio"),
        newest("assessment_demand_lo_ratio"),
        newest("assessment_demand_hi_ratio"),
        newest("assessment_capacity_requests"),
        newest("assessment_capacity_requests_per_s"),
        Target("time() - max by (instance, source) (@assessment_unix_s)"),
    ],
    "What the agent found at its last assessment. Demand over capacity above 100 % does not fit."
    " `agent assess --server NAME` tells why, and what would overturn it.",
    "table",
    width=24,
    height=7,
    more={
        "transformations": merged("Value #A"),
        "fieldConfig": {
            "overrides": [
                named("source", "server or service", "none"),
                named("Value #B", "demand / capacity", "percentunit"),
                named("Value #C", "low end", "percentunit"),
                named("Value #D", "high end", "percentunit"),
                named("Value #E", "holds, requests at once", "short"),
                named("Value #F", "holds, requests/s", "reqps"),
                named("Value #G", "age", "s"),
            ]
        },
    },
)

OVERVIEW = Dashboard(
    "overview",
    "servefit: overview",
    "Does the hardware fit the load: the newest verdicts, the room left, what users see, what it"
    " costs.",
    [
        INSTANCE,
        MODEL,
        JUDGED,
        Typed("gpu_hour", "Price of a GPU hour", "1"),
        Typed("kwh", "Price of a kWh, where the GPUs are owned", "0"),
    ],
    [
        (
            "Fit",
            [
                VERDICTS,
                Panel(
                    "Demand over capacity",
                    "percentunit",
                    [
                        Target("max by (source) (@assessment_demand_ratio)", "{{source}}"),
                        Target("max by (source) (@assessment_demand_lo_ratio)", "{{source}} low"),
                        Target("max by (source) (@assessment_demand_hi_ratio)", "{{source}} high"),
                    ],
                    "Of each verdict, with its interval. Above 100 % the demand does not fit.",
                    more={"fieldConfig": {"defaults": {
                        "thresholds": thresholds(("green", None), ("red", 1)), **LINE}}},
                ),
                Panel(
                    "Requests at once, and what the server holds",
                    "short",
                    [
                        Target(IN_FLIGHT, "{{source}} in flight"),
                        Target(CAPACITY, "{{source}} holds"),
                    ],
                    "In flight: running and waiting. What it holds is of the newest verdict.",
                ),
                Panel(
                    "Headroom now",
                    "percentunit",
                    each(f"1 - {IN_FLIGHT} / on (instance, source) ({CAPACITY} > 0)", "{{source}}"),
                    "Share of the capacity that is free at this moment; below 0 it is overrun. One"
                    " moment is no verdict.",
                    "stat",
                    more={"fieldConfig": {"defaults": {
                        "thresholds": thresholds(("red", None), ("orange", 0.1), ("green", 0.3))}}},
                ),
            ],
        ),
        (
            "What users see",
            [
                Panel("Time to first token", "s", with_bound("ttft_seconds", "ttft"), width=12),
                Panel("Time between tokens", "s", with_bound("itl_seconds", "itl"), width=12),
            ],
        ),
        (
            "Load and cost",
            [
                Panel("Output tokens a second", "suffix:tok/s", each(TOKENS, "{{source}}")),
                Panel(
                    "Energy of an output token",
                    "joule",
                    each(f"{WATTS} / ({TOKENS} > 0)", "{{source}}"),
                    "Energy of the server's GPUs, by their counters, over its output tokens. A GPU"
                    " that two servers share counts for both.",
                ),
                Panel(
                    "Cost of a million output tokens",
                    "short",
                    each(COST, "{{source}}"),
                    "GPU hours at the price above, and kWh at theirs, over the tokens written."
                    " At the prices 1 and 0 it is in GPU hours.",
                ),
            ],
        ),
    ],
)  # fmt: skip

STAGES = [
    Target(mean(f"{stage}_seconds"), f"{{{{source}}}} {stage}")
    for stage in ("queue", "prefill", "decode")
]

ONE_SERVER = Dashboard(
    "server",
    "servefit: server",
    "One inference server, as its own metrics page tells: load, KV cache, latency, lengths.",
    [INSTANCE, MODEL, SERVER],
    [
        (
            "Load",
            [
                Panel(
                    "Requests",
                    "short",
                    [
                        Target("sum by (source) (@requests_running)", "{{source}} running"),
                        Target("sum by (source) (@requests_waiting)", "{{source}} waiting"),
                    ],
                ),
                Panel(
                    "Tokens a second",
                    "suffix:tok/s",
                    [
                        Target(f"sum by (source) ({rate('output_tokens_total')})",
                               "{{source}} output"),
                        Target(f"sum by (source) ({rate('prompt_tokens_total')})",
                               "{{source}} prompt"),
                    ],
                ),
                Panel(
                    "Requests a second",
                    "reqps",
                    [
                        Target(f"sum by (source) ({rate('requests_finished_total')})",
                               "{{source}} finished"),
                        Target(f"sum by (source) ({rate('requests_aborted_total')})",
                               "{{source}} aborted"),
                    ],
                ),
            ],
        ),
        (
            "KV cache",
            [
                Panel(
                    "KV cache in use",
                    "percentunit",
                    each("avg by (source) (@kv_usage_ratio)", "{{source}}"),
                    "Averaged over ranks and replicas. Near 100 % requests wait or are preempted.",
                    width=6,
                    more={"fieldConfig": {"defaults": {
                        **SHARE, "thresholds": thresholds(("green", None), ("red", 0.9)), **LINE}}},
                ),
                Panel(
                    "KV cache holds",
                    "count:tok",
                    each("sum by (source) (@kv_capacity_tokens)", "{{source}}"),
                    kind="stat",
                    width=6,
                ),
                Panel(
                    "Preemptions",
                    "reqps",
                    each(f"sum by (source) ({rate('preemptions_total')})", "{{source}}"),
                    "Requests thrown out of the KV cache, to be computed again.",
                    width=6,
                ),
                Panel(
                    "Prefix cache hits",
                    "percentunit",
                    each(
                        f"sum by (source) ({rate('prefix_cache_hits_total')})"
                        f" / (sum by (source) ({rate('prefix_cache_queries_total')}) > 0)",
                        "{{source}}",
                    ),
                    "Share of the tokens looked up that were found.",
                    width=6,
                    more={"fieldConfig": {"defaults": SHARE}},
                ),
            ],
        ),
        (
            "Latency, by the server's own histograms",
            [
                Panel("Time to first token", "s", with_bound("ttft_seconds", "ttft")),
                Panel("Time between tokens", "s", with_bound("itl_seconds", "itl")),
                Panel("Time per output token of a request", "s",
                      quantiles("tpot_seconds", 0.5, 0.95, 0.99)),
                Panel("Whole time of a request", "s", quantiles("e2e_seconds", 0.5, 0.95, 0.99)),
                Panel("Stages of a request", "s", STAGES,
                      "Means: in the queue, in prefill, in decode."),
                Panel(
                    "Times to first token",
                    "s",
                    each("sum by (le) (increase(@ttft_seconds_bucket[$__rate_interval]))",
                         "{{le}}"),
                    "How many requests fell into each bucket; all the servers chosen together.",
                    "heatmap",
                ),
            ],
        ),
        (
            "What is asked",
            [
                Panel("Prompt length", "suffix:tok",
                      quantiles("prompt_length_tokens", 0.5, 0.95, 0.99)),
                Panel("Output length", "suffix:tok",
                      quantiles("output_length_tokens", 0.5, 0.95, 0.99)),
                Panel(
                    "Up since",
                    "dateTimeFromNow",
                    each("1000 * max by (source) (@server_start_unix_s)", "{{source}}"),
                    "When the server's process began.",
                    "stat",
                    more={"options": {"graphMode": "none"}},
                ),
            ],
        ),
    ],
)  # fmt: skip


def of_gpu(series: str) -> str:
    return f"max by (gpu) (@{series})"


ONE_GPU = Dashboard(
    "gpu",
    "servefit: GPU",
    "One GPU: how busy, how hot, what holds it down. Neither memory in use nor utilization nor"
    " power alone says that it is too small or too big.",
    [INSTANCE, DEVICE],
    [
        (
            "Work",
            [
                Panel(
                    "Utilization",
                    "percentunit",
                    [
                        Target(of_gpu("gpu_utilization_ratio"), "{{gpu}} any kernel"),
                        Target(of_gpu("gpu_memory_busy_ratio"), "{{gpu}} memory"),
                    ],
                    "Share of time in which anything ran, or memory was accessed: no measure of how"
                    " much of the device works.",
                    more={"fieldConfig": {"defaults": SHARE}},
                ),
                Panel(
                    "What works in it",
                    "percentunit",
                    [
                        Target(of_gpu("gpu_dram_active_ratio"), "{{gpu}} memory bandwidth"),
                        Target(of_gpu("gpu_tensor_active_ratio"), "{{gpu}} tensor cores"),
                    ],
                    "Tells bound by memory from bound by arithmetic; where dcgm-exporter says it.",
                    more={"fieldConfig": {"defaults": SHARE}},
                ),
                Panel(
                    "Memory",
                    "bytes",
                    [
                        Target(of_gpu("gpu_memory_used_bytes"), "{{gpu}} used"),
                        Target(of_gpu("gpu_memory_reserved_bytes"), "{{gpu}} by the driver"),
                        Target(of_gpu("gpu_memory_total_bytes"), "{{gpu}} has"),
                    ],
                    "Servers take their KV cache at the start: full is usual.",
                ),
            ],
        ),
        (
            "Power and heat",
            [
                Panel("Power", "watt", each(of_gpu("gpu_power_w"), "{{gpu}}"),
                      "By the energy counter, where there is one."),
                Panel("Energy of the range shown", "joule",
                      each("sum by (gpu) (increase(@gpu_energy_j[$__range]))", "{{gpu}}"),
                      kind="stat"),
                Panel("Temperature", "celsius", each(of_gpu("gpu_temperature_c"), "{{gpu}}")),
                Panel(
                    "Clocks",
                    "hertz",
                    [
                        Target(of_gpu("gpu_sm_clock_hz"), "{{gpu}} SM"),
                        Target(of_gpu("gpu_memory_clock_hz"), "{{gpu}} memory"),
                    ],
                ),
                Panel(
                    "Held down",
                    "percentunit",
                    [
                        Target(f"sum by (gpu, reason) ({rate('gpu_throttled_seconds_total')})",
                               "{{gpu}} {{reason}}"),
                        Target(of_gpu("gpu_throttled"), "{{gpu}} now"),
                    ],
                    "Share of time in which heat or power held the clocks down.",
                ),
                Panel(
                    "PCIe",
                    "Bps",
                    [
                        Target(of_gpu("gpu_pcie_sent_bytes_per_s"), "{{gpu}} sent"),
                        Target(of_gpu("gpu_pcie_received_bytes_per_s"), "{{gpu}} received"),
                    ],
                ),
            ],
        ),
        (
            "Errors",
            [
                Panel(
                    "Memory errors",
                    "short",
                    [
                        Target(of_gpu("gpu_ecc_corrected_total"), "{{gpu}} corrected"),
                        Target(of_gpu("gpu_ecc_uncorrected_total"), "{{gpu}} not corrected"),
                    ],
                    "Since the machine was started.",
                ),
                Panel(
                    "PCIe packets sent again",
                    "short",
                    each("sum by (gpu) (increase(@gpu_pcie_replays_total[$__rate_interval]))",
                         "{{gpu}}"),
                ),
                Panel(
                    "Xid errors",
                    "none",
                    [
                        Target(of_gpu("gpu_xid_errors_total"), "{{gpu}} since the agent looks"),
                        Target(of_gpu("gpu_last_xid"), "{{gpu}} newest number"),
                    ],
                    "Above 0 the driver has written of an error into the machine's log.",
                    "stat",
                ),
            ],
        ),
    ],
)  # fmt: skip

AGENT = Dashboard(
    "agent",
    "servefit: agent",
    "The agent itself and its machine: is what the other dashboards show complete, and what does"
    " observing cost.",
    [INSTANCE],
    [
        (
            "Does it see",
            [
                Panel(
                    "Samplers",
                    "none",
                    each("min by (instance, sampler) (@sampler_ok)", "{{instance}} {{sampler}}"),
                    "1 where the last sample came. `agent doctor` says what is wrong.",
                    "stat",
                    more={
                        "options": {"graphMode": "none", "colorMode": "background"},
                        "fieldConfig": {"defaults": {
                            "thresholds": thresholds(("red", None), ("green", 1))}},
                    },
                ),
                Panel("Age of the last sample", "s",
                      each("max by (instance, sampler) (@sampler_age_s)",
                           "{{instance}} {{sampler}}")),
                Panel("Failed samples", "suffix:/s",
                      each(f"sum by (instance, sampler) ({rate('sampler_errors_total')})",
                           "{{instance}} {{sampler}}")),
                Panel("How long a sample takes", "s",
                      each("max by (instance, sampler) (@sampler_duration_s)",
                           "{{instance}} {{sampler}}"),
                      "Of a server it is the time that its metrics page takes."),
                Panel("Up since", "dateTimeFromNow",
                      each("1000 * max by (instance) (@agent_start_unix_s)", "{{instance}}"),
                      kind="stat", more={"options": {"graphMode": "none"}}),
                Panel("Written later than sampled", "s",
                      each("max by (instance) (@agent_store_writer_lag_s)", "{{instance}}"),
                      "Age of the oldest reading that is not yet in the store."),
            ],
        ),
        (
            "What it costs",
            [
                Panel("Processor", "percentunit",
                      each(f"sum by (instance) ({rate('agent_cpu_seconds_total')})",
                           "{{instance}}"),
                      "Of one processor."),
                Panel("Memory", "bytes",
                      each("max by (instance) (@agent_memory_bytes)", "{{instance}}")),
                Panel("Store", "bytes",
                      each("max by (instance) (@agent_store_bytes)", "{{instance}}")),
            ],
        ),
        (
            "Export by OTLP",
            [
                Panel("Requests that wait", "short",
                      each("sum by (instance, kind) (@agent_outbox_pending)",
                           "{{instance}} {{kind}}")),
                Panel("Their size", "bytes",
                      each("sum by (instance, kind) (@agent_outbox_bytes)",
                           "{{instance}} {{kind}}")),
                Panel(
                    "Requests",
                    "reqps",
                    [
                        Target(f"sum by (instance, kind) ({rate('agent_outbox_sent_total')})",
                               "{{instance}} {{kind}} sent"),
                        Target(f"sum by (instance, kind) ({rate('agent_outbox_dropped_total')})",
                               "{{instance}} {{kind}} given up"),
                        Target(
                            "sum by (instance, kind) "
                            f"({rate('agent_outbox_rejected_points_total')})",
                            "{{instance}} {{kind}} points refused",
                        ),
                    ],
                ),
            ],
        ),
        (
            "The machine",
            [
                Panel(
                    "Processors in use",
                    "percentunit",
                    each("max by (instance) (@host_cpu_usage_ratio)", "{{instance}}"),
                    more={"fieldConfig": {"defaults": SHARE}},
                ),
                Panel(
                    "Memory",
                    "bytes",
                    [
                        Target("max by (instance) (@host_memory_used_bytes)", "{{instance}} used"),
                        Target("max by (instance) (@host_memory_total_bytes)", "{{instance}} has"),
                        Target("max by (instance) (@host_swap_used_bytes)", "{{instance}} swap"),
                    ],
                ),
                Panel(
                    "Stalled",
                    "percentunit",
                    each("sum by (instance, resource, share) "
                         f"({rate('host_pressure_seconds_total')})",
                         "{{instance}} {{resource}} {{share}}"),
                    "Share of time in which some, or all, had to wait for a resource.",
                    more={"fieldConfig": {"defaults": SHARE}},
                ),
                Panel("Processors that servers use", "short",
                      each(f"sum by (instance, port) ({rate('server_process_cpu_seconds_total')})",
                           "{{instance}} port {{port}}"), width=12),
                Panel("Memory of servers", "bytes",
                      each("sum by (instance, port) (@server_process_memory_bytes)",
                           "{{instance}} port {{port}}"),
                      "What processes share counts twice.", width=12),
            ],
        ),
    ],
)  # fmt: skip


def by_load(title: str, unit: str, load: str, *series: tuple[str, str], about: str = "") -> Panel:
    """A figure against the load of its level, which is the label `load`."""
    letters = "ABC"[: len(series)]
    # One series alone is called Value, of several each has its letter.
    names = [f"Value #{letter}" for letter in letters] if len(series) > 1 else ["Value"]
    return Panel(
        title,
        unit,
        [
            Target(f'max by ({load}) (@{name}{{{load}!=""}})') for name, _ in series
        ],
        about,
        "trend",
        width=12,
        more={
            "transformations": [
                *merged(),
                {"id": "convertFieldType", "options": {"fields": {}, "conversions": [
                    {"targetField": load, "destinationType": "number"}]}},
                {"id": "sortBy", "options": {"fields": {}, "sort": [
                    {"field": load, "desc": False}]}},
            ],
            "options": {"xField": load},
            "fieldConfig": {"overrides": [
                named(load, "requests at once" if load == "concurrency" else "requests/s offered",
                      "short"),
                *(named(name, shown, unit)
                  for name, (_, shown) in zip(names, series, strict=True)),
            ]},
        },
    )  # fmt: skip


def curve(load: str) -> list[Panel]:
    """The panels of a curve, by concurrency or by offered rate."""
    return [
        by_load(
            "Output tokens a second", "suffix:tok/s", load,
            ("curve_output_tokens_per_s", "measured"),
            ("curve_output_lo_tokens_per_s", "low end"),
            ("curve_output_hi_tokens_per_s", "high end"),
            about="With its 95 % interval. Where it no longer rises, more load buys nothing.",
        ),
        by_load("Requests a second", "reqps", load, ("curve_requests_per_s", "measured")),
        by_load("Latency, 95th percentile", "s", load,
                ("curve_ttft_p95_s", "time to first token"),
                ("curve_itl_p95_s", "time between tokens")),
        by_load("KV cache in use", "percentunit", load, ("curve_kv_usage_ratio", "mean")),
        by_load("Energy of an output token", "joule", load,
                ("curve_energy_j_per_output_token", "GPUs"),
                about="Of sweeps whose GPUs were read, here or by `loadgen sweep --agent`."),
    ]  # fmt: skip


BY_RATE = "By requests a second (a sweep with --rate)"

SWEEP = Dashboard(
    "sweep",
    "servefit: sweep",
    "The newest curve that the agent was handed for a server: `loadgen sweep --agent URL`, or"
    " `agent import`. Invalid levels are left out; repeats of a load are one point.",
    [INSTANCE, SWEPT],
    [
        (
            "Which sweep",
            [
                Panel(
                    "The curve",
                    "dateTimeAsIso",
                    [Target("1000 * max by (source, run, model, simulated)"
                            " (@curve_received_unix_s)")],
                    kind="table",
                    width=24,
                    height=4,
                    more={
                        "transformations": merged(),
                        "fieldConfig": {"overrides": [
                            named("Value", "handed over", "dateTimeAsIso")]},
                    },
                ),
            ],
        ),
        ("By requests at once", curve("concurrency")),
        (BY_RATE, curve("offered_rps")),
    ],
    # Most sweeps have no such level, and a panel of none says "Unable to find field".
    frozenset((BY_RATE,)),
)  # fmt: skip

DASHBOARDS = (OVERVIEW, ONE_SERVER, ONE_GPU, AGENT, SWEEP)


def files() -> dict[Path, str]:
    """What each dashboard's file holds."""
    return {
        HERE / f"{one.name}.json": json.dumps(render_all(one), indent=1) + "\n"
        for one in DASHBOARDS
    }


def main(arguments: Sequence[str]) -> int:
    made = files()
    if list(arguments) == ["--check"]:
        stale = [path.name for path, text in made.items() if path.read_text("utf-8") != text]
        print(f"stale: {', '.join(stale)}" if stale else "as generated")
        return 1 if stale else 0
    for path, text in made.items():
        path.write_text(text, "utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
