"""What people call findings and reasons."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from agent.sizing.sentences import ACTIONS
from agent.terms import FINDINGS, REASONS, script

ROOT = Path(__file__).parents[2]
CSS = (ROOT / "agent/web/static/servefit.css").read_text("utf-8")


def codes_in(tree: ast.AST) -> set[str]:
    """The first argument of every `Reason(…)`, where it is written out."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    firsts = [one.args[0] for one in calls if ast.unparse(one.func).split(".")[-1] == "Reason"]
    return {str(one.value) for one in firsts if isinstance(one, ast.Constant)}


def test_every_reason_that_is_given_has_words() -> None:
    paths = [*(ROOT / "agent").rglob("*.py"), *(ROOT / "loadgen").rglob("*.py")]
    given = set[str]().union(*(codes_in(ast.parse(path.read_text("utf-8"))) for path in paths))
    assert len(given) > 10
    assert (given | set(ACTIONS)) - set(REASONS) == set()


def test_every_tone_is_a_colour_of_the_pages() -> None:
    for _, tone in FINDINGS.values():
        assert re.search(rf"^\.{tone} {{ --tone:", CSS, re.MULTILINE)


def test_the_script_is_one_statement_of_plain_text() -> None:
    assert script().isascii()
    assert "<" not in script()
