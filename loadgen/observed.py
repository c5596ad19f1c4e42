"""`--workload-from`: the pattern that an agent observed, from its page or from a file."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from agent.model import TargetError

if TYPE_CHECKING:
    from loadgen.pattern import Pattern

TIMEOUT_S = 10.0
PAGE = "/api/v1/pattern"


def pattern_from(where: str) -> Pattern:
    """An agent's base URL, the URL of its pattern, or a file. Raises TargetError and UsageError."""
    from loadgen import pattern
    from loadgen.config import read_text

    if not where.startswith(("http://", "https://")):
        return pattern.parse(read_text(where, "--workload-from"), where)
    url = where if PAGE in where else where.rstrip("/") + PAGE
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
            return pattern.parse(reply.read(), url)
    except urllib.error.HTTPError as error:
        raise TargetError(
            f"--workload-from {url}: it answered {error.code}; is this an agent's address?"
        ) from error
    except OSError as error:
        why = getattr(error, "reason", None) or error
        raise TargetError(f"--workload-from {url}: {why}; is the agent running there?") from error
