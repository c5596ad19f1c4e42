"""One HTML file that opens with no network: the frame that the report and the comparison share.

Nothing is loaded from anywhere and the page says so itself: its content security policy allows the
hashes of its own scripts and styles and nothing else. Numbers go to the charts as JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from loadgen.report.labels import NOTHING, number

CHARTS = ("sharp.js", "vendor/uPlot/uPlot.iife.min.js", "charts.js", "specs.js")
STYLES = ("vendor/uPlot/uPlot.min.css", "servefit.css", "report.css")
BADGE = '<span class="badge simulated">simulated</span>'


def document(title: str, body: str, data: Any, scripts: Sequence[str]) -> str:
    """The whole file. `data`: what `scripts`, names of the page's static folder, draw from."""
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(title)}</title>",
            *(f"<style>{_asset(name)}</style>" for name in STYLES),
            "</head>\n<body>",
            f'<main class="page">{body}</main>',
            '<div id="status" class="unseen" role="status"></div>',
            f'<script type="application/json" id="data">{_embedded(data)}</script>',
            *(f"<script>{_asset(name)}</script>" for name in scripts),
            "</body>\n</html>\n",
        )
    )


@cache
def _asset(name: str) -> str:
    """A file of the page's static folder, checked to be safe inside its element."""
    path = files("agent.web").joinpath("static")
    for part in name.split("/"):
        path = path.joinpath(part)
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    assert not any(end in text.lower() for end in ("</script", "</style", "<!--")), name
    return text


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _policy(scripts: Sequence[str]) -> str:
    """Only our own inline code by its hash; the network, frames and forms not at all."""
    codes = " ".join(_hash(_asset(name)) for name in scripts)
    styles = " ".join(_hash(_asset(name)) for name in STYLES)
    return (
        f"default-src 'none'; script-src {codes}; style-src {styles}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _embedded(data: Any) -> str:
    """JSON that cannot end its script element, whatever a name contains."""
    text = json.dumps(data, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


# ------------------------------------------------------------------------------------------- parts


def percent(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value * 100:.1f}".removesuffix(".0") + " %"


def value_text(value: Any) -> str:
    """Anything that evidence may hold, as one short line."""
    match value:
        case None:
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return number(value)
        case dict():
            return ", ".join(f"{key} {value_text(item)}" for key, item in value.items())
        case list() | tuple():
            return ", ".join(map(value_text, value)) or "none"
        case _:
            return str(value)


def titled(name: str, title: str, inside: str) -> str:
    """A section with its heading; `inside` is markup."""
    return f'<section aria-labelledby="h-{name}"><h2 id="h-{name}">{title}</h2>{inside}</section>'


def scroll(name: str, table: str) -> str:
    """A table that may be wider than the page, reached by keyboard; both are markup."""
    return (
        f'<div class="card scroll" role="region" tabindex="0" aria-label="Table of {name}">'
        f"{table}</div>"
    )


def charts(name: str) -> str:
    """The place that the charts of this name are drawn into."""
    return f'<div class="grid" data-charts="{name}"></div>'


def lead(side: str = "") -> str:
    """The curve, and what stands beside it."""
    return (
        f'<div class="lead{" two" if side else ""}"><div class="grid" data-charts="curve">'
        "<noscript>The charts need JavaScript; the table below holds the same numbers.</noscript>"
        f"</div>{side}</div>"
    )


def pairs(of: Iterable[tuple[str, str | None]]) -> str:
    """Names and values of a <dl>; what is not known is left out."""
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in of if value
    )
