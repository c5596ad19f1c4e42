"""What is looked for in every page: its numbers, what overlaps, what axe finds."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.conftest import find_axe
from tests.support import require

OVERLAPPING = """[...document.querySelectorAll("main, main section, .pair, .lead, .grid, figure")]
    .flatMap((parent) => {
      const boxes = [...parent.children].map((e) => [e, e.getBoundingClientRect()])
        .filter(([, box]) => box.width && box.height);
      return boxes.flatMap(([one, a], i) => boxes.slice(i + 1)
        .filter(([, b]) => a.left < b.right - 1 && b.left < a.right - 1
          && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        .map(([other]) => `${one.tagName}.${one.className} ${other.className}`));
    })"""


def embedded(page: str) -> dict[str, Any]:
    """The numbers that a page was written with."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def overlapping(page: Any) -> list[str]:
    """Neighbours that lie over each other."""
    found: list[str] = page.evaluate(OVERLAPPING)
    return found


def violations(page: Any) -> list[tuple[str, str, str]]:
    """What axe says of it: its rule, how bad that is, and the first element. Skips where axe-core
    is missing."""
    script = find_axe()
    require(script, "axe-core (make real-parts)")
    assert script is not None
    session = page.context.new_cdp_session(page)  # the page's policy would refuse the script
    session.send("Runtime.evaluate", {"expression": script.read_text("utf-8")})
    found = page.evaluate("axe.run().then((found) => found.violations)")
    return [(one["id"], one["impact"], one["nodes"][0]["html"][:200]) for one in found]
