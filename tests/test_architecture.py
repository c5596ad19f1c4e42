"""Who may import whom: read from the sources, so that a lazy import inside a function counts."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Modules that compute and touch nothing: the standard library, numpy, msgspec and each other only.
PURE = {
    "agent.model",
    "agent.metrics",
    "agent.stats",
    "agent.join",
    "agent.minutes",
    "agent.words",
    "agent.terms",
    "agent.forms",
    "agent.doctor",
    "agent.samplers.dialects",
    "agent.samplers.energy",
    "agent.samplers.exposition",
    "agent.exporters",
    "agent.exporters.concluded",
    "agent.exporters.prometheus",
    "agent.chunks",
    "agent.places",
    "agent.rows",
    "agent.schema",
    "agent.timeline",
    "agent.when",
    "loadgen.units",
    "loadgen.arrival",
    "loadgen.lengths",
    "loadgen.pattern",
    "loadgen.prompts",
    "loadgen.workload",
    "loadgen.api",
    "loadgen.usual",
    "loadgen.sse",
    "loadgen.level",
    "loadgen.moment",
    "loadgen.search",
    "loadgen.kept",
    "loadgen.compare",
    "loadgen.report.card",
    "loadgen.report.frame",
    "loadgen.report.labels",
    "loadgen.report.picture",
    "loadgen.report.words",
    "loadgen.conclude",
} | {
    f"agent.sizing.{path.stem}"
    for path in (ROOT / "agent/sizing").glob("*.py")
    if path.stem != "__init__"
}
PURE_MAY_IMPORT = {"numpy", "msgspec"} | sys.stdlib_module_names
# The recorder is arrays and numpy too, but names the client's Exchange for its annotations.
ALSO = {name: {"loadgen.recorder"} for name in ("loadgen.level", "loadgen.moment")}
# What touches the world has no place in a pure module, standard library or not.
NOT_PURE = {"asyncio", "socket", "subprocess", "threading", "urllib", "http", "sqlite3", "ssl"}

# The agent's process and its page; everything else of the agent is a library for both.
NOT_FOR_LOADGEN = ("agent.web", "agent.daemon", "agent.parts", "agent.cli")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> dict[str, Path]:
    return {name_of(path): path for path in sorted((ROOT / package).rglob("*.py"))}


SOURCES = modules("agent") | modules("loadgen")


def type_checking_lines(tree: ast.Module) -> set[int]:
    """The lines under `if TYPE_CHECKING:`; nothing there is imported when the program runs."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for line in range(child.lineno, (child.end_lineno or child.lineno) + 1)
    }


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; `from package import module` names the module."""
    tree = ast.parse(path.read_text("utf-8"))
    only_types = type_checking_lines(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute here"
            base = node.module or ""
            inner = [f"{base}.{a.name}" for a in node.names if f"{base}.{a.name}" in SOURCES]
            yield from ((node.lineno, module) for module in inner)
            if len(inner) < len(node.names):
                yield node.lineno, base


def violations(names: Iterator[str], is_allowed: object) -> list[str]:
    assert callable(is_allowed)
    return [
        f"{name}:{line} imports {module}"
        for name in names
        for line, module in imports(name, SOURCES[name])
        if not is_allowed(module)
    ]


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def test_the_agent_knows_nothing_of_the_load_generator() -> None:
    agents = (name for name in SOURCES if is_within(name, ("agent",)))
    assert not violations(agents, lambda module: not is_within(module, ("loadgen",)))


def test_the_load_generator_uses_the_agents_parts_but_not_its_daemon_or_page() -> None:
    ours = (name for name in SOURCES if is_within(name, ("loadgen",)))

    assert not violations(ours, lambda module: not is_within(module, NOT_FOR_LOADGEN))


@pytest.mark.parametrize("name", sorted(PURE & set(SOURCES)))
def test_a_pure_module_imports_nothing_that_acts(name: str) -> None:
    def is_allowed(module: str) -> bool:
        top = module.split(".")[0]
        is_ours = module in PURE | ALSO.get(name, set())
        return is_ours or (top in PURE_MAY_IMPORT and top not in NOT_PURE)

    assert not violations(iter([name]), is_allowed)


def test_the_scripts_for_vllm_need_nothing_but_its_interpreter() -> None:
    scripts = (name for name in SOURCES if name.startswith("loadgen.targets.in_vllm."))
    allowed = {"tokenizers"} | sys.stdlib_module_names
    assert not violations(scripts, lambda module: module.split(".")[0] in allowed)


def test_nothing_strange_is_kept_at_the_top() -> None:
    """What a download or a run leaves there is easily committed with the rest."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} == {
        ".ci", ".gitignore", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "Makefile", "README.md",
        "agent", "config", "dashboards", "loadgen", "pyproject.toml", "tests",
    }  # fmt: skip


def test_the_walk_sees_what_it_must(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nimport json, socket\nfrom agent import model, other\n"
        "if TYPE_CHECKING:\n    import aiohttp\ndef f():\n    from agent.web.app import run\n"
    )
    assert set(imports("m", source)) == {
        (1, "typing"),
        (2, "json"),
        (2, "socket"),
        (3, "agent.model"),
        (3, "agent"),
        (7, "agent.web.app"),
    }
