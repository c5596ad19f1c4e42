"""Numbers and verdicts as a person reads them, the same in every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model import Verdict


def printable(text: str) -> str:
    """One line that cannot steer a terminal, whatever a server, a file or a name put into it."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


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
    recommendation = verdict.recommendation
    if recommendation is not None:
        if action:
            lines.append(f"do: {recommendation.action}")
        if recommendation.confirm_with:
            lines.append(f"confirm with: {recommendation.confirm_with}")
        if recommendation.overturned_by:
            lines.append(f"overturned by: {recommendation.overturned_by}")
    lines += [f"missing: {text}" for text in verdict.missing]
    return lines
