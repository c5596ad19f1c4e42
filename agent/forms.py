"""A verdict on paper: as text, as Markdown, as one small page of HTML; and what the live page says.

Pure. Names come from servers and files: every one is made harmless for the form it is put into.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.words import ms, number, offer_lines, printable, saving, span, verdict_lines

if TYPE_CHECKING:
    from agent.model import Verdict
    from agent.sizing.pattern import Distribution, Pattern, Spread


class Sheet(NamedTuple):
    """One verdict: of what, and the numbers it rests on (name, value)."""

    title: str
    verdict: Verdict
    evidence: list[tuple[str, str]]


def sheet(title: str, verdict: Verdict, pattern: Pattern | None = None) -> Sheet:
    """`pattern`: what was observed, where anything was."""
    rows = _observed(pattern) if pattern is not None else []
    rows += _concluded(verdict)
    return Sheet(title, verdict, [(name, text) for name, text in rows if text])


# ---------------------------------------------------------------------------------------- evidence


def _observed(seen: Pattern) -> list[tuple[str, str]]:
    from agent.sizing.scene import span as lasting

    return [
        ("observed", f"{lasting(seen.covered_s)} of {lasting(seen.window_s)}"),
        ("requests", "" if seen.requests is None else number(seen.requests)),
        ("in flight: mean, P95, P99, most", _spread(seen.concurrency)),
        ("waiting: mean, P95, P99, most", _spread(seen.waiting)),
        ("KV cache in use, most", _percent(seen.kv_usage.max)),
        ("preemptions", "" if seen.preemptions is None else number(seen.preemptions)),
        ("TTFT p50, p95, p99", _latency(seen.ttft_ms)),
        ("ITL p50, p95, p99", _latency(seen.itl_ms)),
        ("tokens of a prompt, of an answer", _pair(
            seen.prompt_tokens_per_request.mean, seen.output_tokens_per_request.mean)),
    ]  # fmt: skip


def _concluded(verdict: Verdict) -> list[tuple[str, str]]:
    cap, energy = verdict.capacity, verdict.energy
    unit = {"rps": "requests/s", "concurrency": "in flight"}.get(str(cap.get("unit")), "")
    ratio = verdict.ratio
    return [
        (f"held ({unit}): surely, about, not", _range(cap.get("lo"), cap.get("value"),
                                                      cap.get("hi"))),
        ("demand over capacity: low, likely, high",
         "" if ratio is None else _range(ratio.lo, ratio.value, ratio.hi)),
        ("J per output token, idle included", _known(energy.get("j_per_output_token"))),
        ("J per output token, busy", _known(energy.get("j_per_output_token_busy"))),
        ("W idle", _known(energy.get("idle_w"))),
        ("J per output token, processors and memory", _known(
            energy.get("host_j_per_output_token"))),
        ("energy while idle", _percent(energy.get("idle_ratio"))),
        ("TTFT p99/p50", _known(verdict.stability.get("ttft_p99_over_p50"))),
        ("ITL p99/p50", _known(verdict.stability.get("itl_p99_over_p50"))),
        *costs(verdict),
    ]  # fmt: skip


def costs(verdict: Verdict) -> list[tuple[str, str]]:
    """What is there and what it costs, each as low, typical and high; what might be cheaper."""
    cost = verdict.cost
    if "gpu" not in cost:
        return []
    tokens = "USD per million output tokens within the SLO"
    return [
        ("hardware", f"{cost['gpus']} x {cost['gpu']}{_basis(cost)}"),
        ("USD a month: low, typical, high", _usd(cost.get("usd_per_month"))),
        (f"{tokens}, idle time included", _usd(cost.get("usd_per_million_output_tokens"))),
        (f"{tokens}, busy", _usd(cost.get("usd_per_million_output_tokens_busy"))),
        ("prices (indicative)", str(cost.get("prices") or "")),
        ("costs not known", str(cost.get("unknown", ""))),
        ("cheapest to test, by prediction", _to_test(verdict)),
    ]


def _basis(cost: dict[str, Any]) -> str:
    return {"rental": ", rented", "owned": ", owned, power included"}.get(str(cost["basis"]), "")


def _usd(amount: dict[str, float | None] | None) -> str:
    return "" if amount is None else _range(*(amount[end] for end in ("low", "typical", "high")))


def _to_test(verdict: Verdict) -> str:
    """The first candidate, where nothing is recommended."""
    offer, found = verdict.recommendation, verdict.cost.get("candidates")
    if not found or (offer is not None and offer.configuration) or not found[0]["usd_per_month"]:
        return ""
    best = found[0]
    month = best["usd_per_month"]
    return f"{best['configuration']}, {span(month['low'], month['high'])} USD a month"


# ------------------------------------------------------------------------------------------ advice


def advice(verdict: Verdict) -> list[tuple[str, str]]:
    """What to do, with what, what that saves, how sure it is and what is paid now (name, sentence):
    what the agent's page shows beside a verdict."""
    offer, test = verdict.recommendation, _to_test(verdict)
    rows = [
        ("What to do", offer.action if offer else ""),
        ("Configuration", offer.configuration if offer else ""),
        ("It then costs", saving(verdict)),
        ("Error bar", offer.error_bar if offer else ""),
        ("Worth a test", f"{test}, by prediction" if test else ""),
        ("It costs now", _costs_now(verdict.cost)),
    ]
    return [(name, text) for name, text in rows if text]


def _costs_now(cost: dict[str, Any]) -> str:
    """What is there and what it costs, in one sentence."""
    if "gpu" not in cost:
        return ""
    month = _usd_from_to(cost.get("usd_per_month"))
    tokens = _usd_from_to(cost.get("usd_per_million_output_tokens"))
    paid = f"{month} USD a month" if month else "no price is known"
    each = f", {tokens} USD per million output tokens that met the SLO" if tokens else ""
    gpus = f"{cost['gpus']} \N{MULTIPLICATION SIGN} {cost['gpu']}"
    return f"{paid} for {gpus}{_basis(cost)}{each}"


def _usd_from_to(amount: dict[str, float | None] | None) -> str:
    """Three significant digits of the low and the high price, else of the typical one."""
    ends = [amount["low"], amount["high"]] if amount else []
    if amount and None in ends:
        ends = [amount["typical"]]
    told = (f"{one:,.0f}" if one >= 100 else f"{one:.3g}" for one in ends if one is not None)
    return "–".join(dict.fromkeys(told))


# ----------------------------------------------------------------------------------------- numbers


def _known(value: float | None) -> str:
    return "" if value is None else number(value)


def _range(*values: float | None) -> str:
    return "" if set(values) == {None} else ", ".join(map(number, values))


def _spread(one: Spread) -> str:
    return _range(one.mean, one.p95, one.p99, one.max)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _latency(one: Distribution) -> str:
    return "" if one.p50 is None else ", ".join(map(ms, (one.p50, one.p95, one.p99)))


def _pair(prompt: float | None, output: float | None) -> str:
    return _range(prompt, output)


# ------------------------------------------------------------------------------------------- forms


def text(one: Sheet) -> list[str]:
    """For a terminal, within a screen: the finding first, then a line each."""
    lines = verdict_lines(one.verdict)
    lines += one.verdict.questions.get("said", [])
    if one.evidence:
        lines.append(" · ".join(f"{name}: {value}" for name, value in one.evidence))
    if one.verdict.rests_on:
        lines.append(f"rests on: {'; '.join(one.verdict.rests_on)}")
    lines.append(f"of: {one.title}")
    return [printable(line) for line in lines]


def markdown(sheets: Sequence[Sheet]) -> str:
    return "\n\n".join(map(_section, sheets)) + "\n"


def _section(one: Sheet) -> str:
    verdict, parts = one.verdict, []
    parts.append(f"# {_md(one.title)}")
    parts.append(f"**{_md(verdict.finding)}**: {_md(verdict.summary)}")
    parts.append(
        f"Confidence {_md(verdict.confidence.level)}, limited by"
        f" {_md(verdict.confidence.limited_by)}."
    )
    table = ["| evidence | value |", "| --- | ---: |"]
    table += [f"| {_md(name)} | {_md(value)} |" for name, value in one.evidence]
    if one.evidence:
        parts.append("\n".join(table))
    for title, lines in _lists(verdict):
        parts.append("\n".join([f"## {title}", "", *(f"- {_md(line)}" for line in lines)]))
    return "\n\n".join(parts)


def _md(words: str) -> str:
    """Text that Markdown shows as it is, HTML included."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", printable(words))


def _lists(verdict: Verdict) -> list[tuple[str, list[str]]]:
    """The rest of a verdict under its headings; empty ones are left out."""
    do = verdict.recommendation
    what = [] if do is None else [
        do.action,
        *offer_lines(verdict),
        *([f"confirm with: {do.confirm_with}"] if do.confirm_with else []),
        *([f"overturned by: {do.overturned_by}"] if do.overturned_by else []),
    ]  # fmt: skip
    qualified = verdict.qualifier or {}
    why = [f"{reason.code}: {reason.because}" for reason in verdict.reasons]
    why += [f"{qualified['name']}: {qualified['because']}"] if "because" in qualified else []
    parts = [
        ("Why", why),
        ("What to do", what),
        ("The three questions", list(verdict.questions.get("said", []))),
        ("What is missing", list(verdict.missing)),
        ("What it rests on", list(verdict.rests_on)),
    ]
    return [(title, lines) for title, lines in parts if lines]


_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;"
    "border-bottom:1px solid #8886}td+td{text-align:right;font-variant-numeric:tabular-nums}"
    "h2{font-size:1rem;margin-bottom:0}li{overflow-wrap:anywhere}"
)


def html(sheets: Sequence[Sheet]) -> str:
    """One self-contained page, without scripts."""
    title = _h(sheets[0].title if len(sheets) == 1 else "assessments")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(map(_article, sheets))}</body></html>\n"
    )


def _article(one: Sheet) -> str:
    verdict = one.verdict
    rows = "".join(
        f"<tr><td>{_h(name)}</td><td>{_h(value)}</td></tr>" for name, value in one.evidence
    )
    lists = "".join(
        f"<h2>{title}</h2><ul>{''.join(f'<li>{_h(line)}</li>' for line in lines)}</ul>"
        for title, lines in _lists(verdict)
    )
    return (
        f"<article><h1>{_h(one.title)}</h1>"
        f"<p><strong>{_h(verdict.finding)}</strong>: {_h(verdict.summary)}</p>"
        f"<p>Confidence {_h(verdict.confidence.level)}, limited by"
        f" {_h(verdict.confidence.limited_by)}.</p>"
        f"<table><tbody>{rows}</tbody></table>{lists}</article>"
    )


def _h(words: str) -> str:
    return escape(printable(words))
