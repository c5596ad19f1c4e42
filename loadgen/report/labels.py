"""What the parts of a sweep are called and how its numbers are written, in every picture of it."""

from __future__ import annotations

from datetime import UTC, datetime

from agent import words
from agent.model import Sweep
from agent.terms import REASONS

NOTHING = "\N{EN DASH}"
TO = " \N{EN DASH} "
TIMES = " \N{MULTIPLICATION SIGN} "


def number(value: float | None) -> str:
    """Three significant digits, never an exponent: as in every table, but no column holds these to
    two decimals, so what is whole has none and what is under one has its digits."""
    if value is not None and float(value).is_integer():
        return f"{value:,.0f}"
    if value is not None and abs(value) < 1:
        return f"{float(f'{value:.3g}'):.9f}".rstrip("0").rstrip(".")
    return words.number(value)


def instant(iso: str) -> str:
    """ISO 8601 as people read it, in UTC; anything else as it stands."""
    try:
        at = datetime.fromisoformat(iso).astimezone(UTC)
    except ValueError:
        return iso
    return at.strftime("%Y-%m-%d %H:%M UTC")


def named(code: str | None) -> str:
    """A reason's code in words."""
    return REASONS.get(code or "", code or NOTHING)


def gpu_names(sweep: Sweep) -> str:
    """How many of which, such as two NVIDIA H100, from the list of GPUs; '' when none is known."""
    names = [gpu.name for gpu in sweep.target.gpus]
    return ", ".join(f"{names.count(name)}{TIMES}{name}" for name in dict.fromkeys(names))


def engine_name(sweep: Sweep) -> str | None:
    """The engine and its version, as far as they are known."""
    return " ".join(filter(None, (sweep.target.engine, sweep.target.engine_version))) or None


def prices_text(sweep: Sweep) -> str:
    """Of which hardware the costs are, and by whose prices; '' where nothing is priced."""
    cost = sweep.verdict.cost if sweep.verdict else {}
    if not any(one.cost_usd_per_million_output_tokens for one in sweep.levels) or "gpu" not in cost:
        return ""
    gpus = f"{cost.get('gpus')}{TIMES}{cost['gpu']}"
    return f"{gpus} at typical prices, indicative: {cost.get('prices') or 'of no known source'}"


def _bound(ms: float) -> str:
    return f"{number(ms / 1000)} s" if ms >= 1000 else f"{number(ms)} ms"


def slo_text(sweep: Sweep) -> str:
    """Every target with its bound; '' without an SLO."""
    parts = [f"{slo.metric.upper()} {slo.statistic} < {_bound(slo.bound_ms)}" for slo in sweep.slo]
    return ", ".join(parts)
