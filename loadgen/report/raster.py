"""An SVG as PNG, by the Chromium or Chrome that is on this machine.

Nothing that is light enough to depend on draws text as well, and whoever wants a picture for a
document has a browser; where there is none, the SVG is the picture.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from agent.model import UsageError

BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)  # fmt: skip
INSTEAD = "--svg FILE needs no browser"
TIMEOUT_S = 60.0
SCALE = 2  # pixels to a unit of the SVG, as on a fine screen


def png(svg: str, width: int, height: int, *, timeout_s: float = TIMEOUT_S) -> bytes:
    """The picture in SCALE pixels to a unit.

    Raises UsageError where there is no browser, or where it did not draw.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UsageError(
            "a PNG is drawn by Chromium or Chrome, and none was found: install one "
            f"(apt install chromium), or {INSTEAD}"
        )
    # Processes of a browser that has ended may still write into its profile.
    with TemporaryDirectory(prefix="servefit-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "picture.svg").write_text(svg, encoding="utf-8")
        said = _draw(browser, folder, width, height, timeout_s)
        try:
            return (folder / "picture.png").read_bytes()
        except OSError:
            raise UsageError(f"{browser} drew no PNG: {said}; {INSTEAD}") from None


def _draw(browser: str, folder: Path, width: int, height: int, timeout_s: float) -> str:
    """Has it drawn; returns the last line that the browser said, for when it was not."""
    command = [
        browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}",
        f"--force-device-scale-factor={SCALE}", f"--screenshot={folder / 'picture.png'}",
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # it refuses to run as root otherwise; the SVG is our own
    try:
        ended = subprocess.run(
            [*command, (folder / "picture.svg").as_uri()],
            capture_output=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return error.strerror or str(error)
    lines = ended.stderr.decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"exit code {ended.returncode}")
