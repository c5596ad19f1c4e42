"""Numbers and verdicts as a person reads them, the same in every command."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model import Level, Sweep, Verdict


def printable(text: str) -> str:
    """One line that cannot steer a terminal, whatever a server, a file or a name put into it."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def is_whole(word: str) -> bool:
    """Plain digits, and not so many of them that int() refuses."""
    return word.isascii() and word.isdigit() and len(word) <= 18


def defect(error: Exception) -> str:
    """What is ours to mend, in one line: where, and never the error's text, which may hold an
    address."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"a defect of servefit: {type(error).__name__}{where}"


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; a dash where nothing was measured."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.2f} s" if value >= 10_000 else f"{number(value)} ms"


def verdict_lines(verdict: Verdict, *, action: bool = True) -> list[str]:
    """The verdict with its evidence, a sentence a line; its `action` unless that was said."""
    lines = [f"{verdict.finding}: {verdict.summary}"]
    confidence = verdict.confidence
    lines.append(f"confidence {confidence.level}, limited by {confidence.limited_by}")
    lines += [f"{reason.code}: {reason.because}" for reason in verdict.reasons]
    if verdict.qualifier and "because" in verdict.qualifier:
        lines.append(f"{verdict.qualifier['name']}: {verdict.qualifier['because']}")
    recommendation = verdict.recommendation
    if recommendation is not None:
        if action:
            lines.append(f"do: {recommendation.action}")
        lines += offer_lines(verdict)
        if recommendation.confirm_with:
            lines.append(f"confirm with: {recommendation.confirm_with}")
        if recommendation.overturned_by:
            lines.append(f"overturned by: {recommendation.overturned_by}")
    lines += [f"missing: {text}" for text in verdict.missing]
    return lines


def offer_lines(verdict: Verdict) -> list[str]:
    """What is recommended in hardware or flags: which, what it saves, how sure that is."""
    offer = verdict.recommendation
    if offer is None:
        return []
    parts = [part for part in (offer.configuration, saving(verdict)) if part]
    name = "configuration" if offer.configuration else "saving"
    lines = [f"{name}: {', '.join(parts)}"] if parts else []
    return lines + ([f"error bar: {offer.error_bar}"] if offer.error_bar else [])


def saving(verdict: Verdict) -> str:
    """`80–83 % less (1,204–2,905 USD a month)`, or how much more; empty where nothing changes."""
    offer, usd = verdict.recommendation, verdict.cost.get("saving_usd_per_month")
    low, high = (offer.saving_lo, offer.saving_hi) if offer is not None else (None, None)
    if low is None or high is None or low == high == 0:
        return ""
    if low < 0 < high:
        return f"from {-100 * low:.0f} % more to {100 * high:.0f} % less"
    word, sign = ("less", 1) if low >= 0 else ("more", -1)
    ends = sorted((100 * sign * low, 100 * sign * high))
    told = f" ({span(*sorted(sign * one for one in usd))} USD a month)" if usd else ""
    return f"{span(*ends)} % {word}{told}"


def span(low: float, high: float) -> str:
    """`80–83`; one number where both are the same as told."""
    return "–".join(dict.fromkeys(f"{value:,.0f}" for value in (low, high)))


# ------------------------------------------------------------------------------------ in a notebook


def sweep_html(sweep: Sweep) -> str:
    """A sweep as a table and its verdict, without scripts or styles: what a notebook shows."""
    run, target = sweep.run, sweep.target
    parts = ("SIMULATED" if run.simulated else "", target.model, target.url, f"run {run.id}")
    opened = any(level.mode == "rate" for level in sweep.levels)
    titles = ("requests/s asked" if opened else "streams", "output tokens/s", "requests/s",
              "TTFT p95", "ITL p95", "E2E p95", "ok", "failed", "valid")  # fmt: skip
    rows = "".join(_html_row("td", _cells(level)) for level in sweep.levels)
    verdict = sweep.verdict
    judged = f"<b>{escape(verdict.finding)}</b>: {escape(verdict.summary)}" if verdict else ""
    return (
        f"<p>{escape(' · '.join(part for part in parts if part))}</p>"
        f"<table><thead>{_html_row('th', titles)}</thead><tbody>{rows}</tbody></table>"
        f"<p>{judged}</p>"
    )


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _cells(level: Level) -> tuple[str, ...]:
    load = level.offered_rps if level.mode == "rate" else level.concurrency
    requests, measured = level.requests, level.measurement
    invalid = measured is not None and not measured.valid
    why = measured.reasons[0] if measured and measured.reasons else "no reason was recorded"
    return (
        "–" if load is None else f"{load:g}",
        number(level.output_tokens_per_s),
        number(level.request_throughput),
        ms(level.ttft_ms.p95),
        ms(level.itl_ms.p95),
        ms(level.e2e_ms.p95),
        str(requests.ok) if requests else "–",
        str(requests.failed) if requests else "–",
        f"NO: {why}" if invalid else "yes",
    )
