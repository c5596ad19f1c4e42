"""The wheel: what is in it, what is not, and that it works where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(argv: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """stdout of a command that must succeed; what it said is in the failure."""
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built the way a user's pip would build it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    [built] = folder.glob("servefit-*.whl")
    return built


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def tracked(*patterns: str) -> set[str]:
    """Files of the packages that are no Python, as they lie in the checkout."""
    return {
        str(path.relative_to(ROOT))
        for package in ("agent", "loadgen")
        for pattern in patterns
        for path in (ROOT / package).rglob(pattern)
    }


def test_the_wheel_has_every_module_and_every_file_they_read(names: set[str]) -> None:
    wanted = tracked("*.py", "py.typed", "*.csv", "*.toml", "*.c")
    wanted |= {
        str(path.relative_to(ROOT))
        for path in (ROOT / "agent/web/static").rglob("*")
        if path.is_file()
    }
    assert wanted - names == set()
    assert {"agent/py.typed", "loadgen/py.typed"} <= names
    assert {n for n in names if n.startswith("agent/web/static/")}


def test_the_wheel_has_its_licence_and_nothing_that_is_not_ours(names: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"agent", "loadgen"}
    assert not {n for n in names if "/tests/" in n or n.endswith((".pyc", ".db", ".log"))}


def test_nothing_in_the_wheel_names_a_place_on_this_machine(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            assert str(ROOT).encode() not in archive.read(name), name


@pytest.mark.parametrize("command", ["loadgen", "agent"])
def test_the_command_answers_from_the_wheel_alone(
    wheel: Path, tmp_path: Path, command: str
) -> None:
    """The wheel's own files, and of our environment only the dependencies."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); command = sys.argv.pop(1)\n"
        "module = __import__(command + '.cli', fromlist=['main'])\n"
        "assert 'site' in module.__file__, module.__file__\n"
        "module.main()\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    argv = [sys.executable, "-c", code, str(tmp_path / "site"), command, "--help"]
    said = run(argv, cwd=empty, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert "Usage" in said
    assert not list(empty.iterdir())
