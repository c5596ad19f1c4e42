"""What a browser shows of the agent until there is more: its name, its servers, its addresses."""

from __future__ import annotations

from html import escape
from urllib.parse import urlencode

from agent.config import shown_url
from agent.live import ServerStatus, Status
from agent.when import utc
from agent.words import printable

_ADDRESSES = {
    "/readyz": "whether it can be relied on now",
    "/metrics": "everything, for Prometheus",
    "/api/v1/status": "samplers, store, outbox, servers and GPUs",
    "/api/v1/pattern?window=1h": "what was asked for, and how it was answered",
    "/api/v1/curve": "tokens/s and latency against concurrency",
    "/api/v1/series?metric=requests_running": "any series",
    "/api/v1/assessment": "what was concluded last",
}


def index_html(status: Status) -> str:
    """The page. Names come from anywhere; they are text in it, whatever they hold."""
    servers = "".join(_server(one) for one in status.servers) or "<li>none is configured</li>"
    addresses = "".join(
        f'<li><a href="{escape(path)}">{escape(path)}</a> – {what}</li>'
        for path, what in _ADDRESSES.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>servefit agent</title>
<link rel="stylesheet" href="/static/servefit.css">
<link rel="stylesheet" href="/static/index.css">
</head>
<body>
<main>
<h1>servefit agent {_text(status.version)}</h1>
<p>Running since {utc(status.started_unix_s)}.</p>
<h2>Servers</h2>
<ul>{servers}</ul>
<h2>Addresses</h2>
<ul>{addresses}</ul>
</main>
</body>
</html>
"""


def _server(one: ServerStatus) -> str:
    pattern = escape("/api/v1/pattern?" + urlencode({"server": one.name, "window": "1h"}))
    about = " · ".join(
        _text(part) for part in (shown_url(one.url), one.engine, one.model) if part is not None
    )
    return f'<li><a href="{pattern}">{_text(one.name)}</a> – {about}</li>'


def _text(text: str) -> str:
    return escape(printable(text))
