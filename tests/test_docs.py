"""The documents: their links lead somewhere, and the commands they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(ROOT.glob("*.md"))
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_MAKE = re.compile(r"\bmake ([a-z][a-z-]*)\b")
_COMMAND = re.compile(r"^(?:\$ )?(loadgen|agent) ([a-z]+)\b", re.MULTILINE)


def code(text: str) -> str:
    """What stands in code fences and between backticks; prose may 'make sense' of anything."""
    fences = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join([*fences, *re.findall(r"`([^`\n]+)`", text)])


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_its_relative_links_lead_to_files(document: Path) -> None:
    links = _LINK.findall(document.read_text("utf-8"))
    files = [link.split("#")[0] for link in links if "://" not in link]
    assert [name for name in files if name and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_its_make_targets_exist(document: Path) -> None:
    named = set(_MAKE.findall(code(document.read_text("utf-8"))))
    assert named - make_targets() == set()


def test_what_predict_prints_is_what_the_readme_says() -> None:
    """It asks nothing of this machine, so that it says the same everywhere."""
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(
        r"^\$ (agent predict (?:[^\n]*\\\n)*[^\n]*\n)(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    assert found is not None
    asked = subprocess.run(
        [sys.executable, "-m", "agent.cli", *shlex.split(found[1].replace("\\\n", ""))[1:]],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert asked.stdout == found[2], asked.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_its_commands_exist(document: Path) -> None:
    for tool, command in sorted(set(_COMMAND.findall(code(document.read_text("utf-8"))))):
        start = f"import sys; from {tool}.cli import main; sys.argv = {[tool, command, '--help']!r}"
        asked = subprocess.run(
            [sys.executable, "-c", f"{start}; main()"], capture_output=True, text=True, timeout=60
        )
        assert asked.returncode == 0, f"{tool} {command}: {asked.stderr}"
