"""What stands beside a finding: the reasons behind the demand, and what was observed in numbers.

Pure. None of it decides; it tells what a finding hangs on (heat, the prefix cache, requests that
are asked again), and each reason comes with its numbers or not at all.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from agent.model import Reason
from agent.sizing.pattern import Distribution, Pattern
from agent.sizing.scene import DAY_S, USUAL, Scene, percent, span


def reasons(scene: Scene, finding: str) -> list[Reason]:
    """What is behind the demand, or behind what was held, where there is evidence of it."""
    if finding in ("IDLE", "INVALID_MEASUREMENT", "INSUFFICIENT_DATA"):
        return []
    tight = finding in ("UNDER_SIZED", "BORDERLINE")
    found = (
        _throttled(scene),
        _prefix_cache(scene),
        *((_retries(scene), _bursts(scene), _diurnal(scene)) if tight else ()),
    )
    return [one for one in found if one is not None]


POWER_BITS = 0x4 | 0x80  # NVML: software power cap, hardware power brake


def _throttled(scene: Scene) -> Reason | None:
    hot = scene.heat
    if hot is None or hot.share < scene.needs.throttled:
        return None
    power = bool(hot.bits & POWER_BITS)
    return Reason(
        "POWER_CAPPED" if power else "THROTTLED",
        f"{'a power limit' if power else 'heat'} held the clocks down in {hot.share:.0%} of the"
        " busy time",
        {"share": hot.share, "clock_event_reasons": hot.bits},
    )


def _prefix_cache(scene: Scene) -> Reason | None:
    hits, trial = scene.pattern.prefix_hit_rate, scene.trial
    if hits is None or hits < scene.needs.prefix_hits:
        return None
    without = trial.uncached if trial is not None else None
    more = ""
    if without is not None:
        taken = percent(1 / max(without, 1e-6))
        more = f"; computed all, the same requests would take {taken} of what it holds"
    return Reason(
        "PREFIX_CACHE_DEPENDENT",
        f"{hits:.0%} of the prompts' tokens were found in the prefix cache{more}",
        {"prefix_hit_rate": hits, "multiple_without": without},
    )


def _retries(scene: Scene) -> Reason | None:
    pattern = scene.pattern
    lost = (pattern.aborts or 0.0) + (pattern.rejections or 0.0)
    if not pattern.requests or lost < scene.needs.retries * pattern.requests:
        return None
    share = lost / pattern.requests
    return Reason(
        "RETRY_INFLATED",
        f"{share:.0%} of the requests were given up or turned away; who asks again is counted"
        " again",
        {"share": share, "aborts": pattern.aborts, "rejections": pattern.rejections},
    )


def _bursts(scene: Scene) -> Reason | None:
    within = scene.pattern.burstiness.within_hours
    if within is None or within < scene.needs.bursts:
        return None
    return Reason(
        "BURST_ONLY",
        f"arrivals come in bursts: their variance within an hour is {within:.1f} times their mean,"
        " where independent ones have 1",
        {"dispersion_within_hours": within},
    )


def _diurnal(scene: Scene) -> Reason | None:
    loads = [cell.mean for cell in scene.pattern.profile if cell.mean is not None]
    if scene.pattern.covered_s < 0.9 * DAY_S or not loads or not sum(loads):
        return None
    ratio = max(loads) / (sum(loads) / len(loads))
    if ratio < scene.needs.peak:
        return None
    return Reason(
        "DIURNAL_PEAK",
        f"the busiest hour of the week has {ratio:.1f} times the mean load",
        {"peak_over_mean": ratio},
    )


# -------------------------------------------------------------------------------------- in numbers


def demand(scene: Scene) -> dict[str, Any]:
    pattern = scene.pattern
    return {
        "window_s": pattern.window_s,
        "covered_s": pattern.covered_s,
        "replicas": scene.replicas,
        "observed": {
            "requests": pattern.requests,
            "concurrency": msgspec.to_builtins(pattern.concurrency),
            "requests_per_s": msgspec.to_builtins(pattern.requests_per_s),
            "hours_of_week": _hours_of_week(pattern),
            "prompt_tokens_mean": pattern.prompt_tokens_per_request.mean,
            "output_tokens_mean": pattern.output_tokens_per_request.mean,
            "busy_ratio": scene.busy_ratio,
            "rejections": pattern.rejections,
            "preemptions": pattern.preemptions,
        },
    }


def _hours_of_week(pattern: Pattern) -> dict[str, float]:
    """Of the mean requests in flight over the observed hours of the week: what has to fit is the
    P99, so one hour in a hundred is left out as it is of the replay (design equation 8)."""
    loads = [cell.mean for cell in pattern.profile if cell.mean is not None]
    if not loads:
        return {}
    return {
        "observed": float(len(loads)),
        "concurrency_p99": float(np.quantile(loads, 0.99)),
        "concurrency_max": max(loads),
    }


def shortened(scene: Scene) -> list[str]:
    """Times that somebody set shorter than they should be are told with every verdict."""
    return [
        f"{name.removesuffix('_s').upper()}: {span(getattr(scene.needs, name))} of observation were"
        f" enough, as configured, where {span(getattr(USUAL, name))} are usual"
        for name in ("idle_s", "right_s", "over_s", "off_peak_s")
        if getattr(scene.needs, name) < getattr(USUAL, name)
    ]


def stability(scene: Scene) -> dict[str, Any]:
    """p99/p50 of TTFT and ITL in production: 1 is perfectly even."""
    pattern = scene.pattern
    found = {
        f"{name}_p99_over_p50": ratio
        for name, one in (("ttft", pattern.ttft_ms), ("itl", pattern.itl_ms))
        if (ratio := _evenness(one)) is not None
    }
    return {"window_s": pattern.window_s, **found} if found else {}


def _evenness(one: Distribution) -> float | None:
    if one.p99 is None or not one.p50 or one.ranges.get("p99", (0.0, None))[1] is None:
        return None
    return one.p99 / one.p50


def questions(scene: Scene) -> dict[str, Any]:
    p99 = scene.pattern.concurrency.p99
    users = "unknown" if p99 is None else "single" if p99 <= 2 else "service"
    return {
        "trains": "yes" if scene.trains else "no",
        "users": users,
        "priority": "steady experience" if scene.slo else "unknown",
    }


def energy(scene: Scene) -> dict[str, Any]:
    """Of the GPUs alone: what the rest of the machine draws is not known."""
    used = scene.pattern.energy
    found = {
        "j_per_output_token": used.j_per_output_token,
        "j_per_output_token_busy": used.j_per_output_token_busy,
        "idle_w": scene.idle_w,
        "mean_w": used.power_w.mean,
        "energy_j": used.energy_j,
    }
    return {name: value for name, value in found.items() if value is not None}
