"""Results to files and to stdout; what cannot be written there is kept elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from agent.model import Sweep


def rendered(sweep: Sweep, form: str) -> bytes:
    if form == "json":
        from agent.model import encode

        return encode(sweep) + b"\n"
    if form == "csv":
        from loadgen.report.table import levels_csv

        return levels_csv(sweep).encode()
    if form == "parquet":
        from loadgen.report.table import levels_parquet

        return levels_parquet(sweep)
    if form == "card":
        from loadgen.report.card import card

        return card(sweep).encode()
    if form in ("svg", "png"):
        from loadgen.report.picture import HEIGHT, WIDTH, svg
        from loadgen.report.raster import png

        return png(svg(sweep), WIDTH, HEIGHT) if form == "png" else svg(sweep).encode()
    from loadgen.report.html import render

    return render(sweep).encode()


def write_all(sweep: Sweep, files: dict[str, str | None], *, quiet: bool) -> bool:
    """Writes what was asked for; True where a file could not be written."""
    failed = False
    for form, path in files.items():
        if path is not None:
            failed |= not write(rendered(sweep, form), path, quiet=quiet)
    return failed


def write(data: bytes, path: str, *, quiet: bool = False) -> bool:
    """Never raises: what was measured must not be lost at the very end."""
    from agent.failures import abandon

    try:
        if path == "-":
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
            return True
        Path(path).write_bytes(data)
    except BrokenPipeError:
        abandon(sys.stdout)  # the reader has gone (`| head`), and wanted no more
        return True
    except OSError as error:
        if path == "-":
            abandon(sys.stdout)
        where, name = ("stdout", "result") if path == "-" else (path, Path(path).name)
        rescued = _rescue(data, name)
        click.echo(f"loadgen: {where}: {error.strerror or error}; {rescued}", err=True)
        return False
    if not quiet:
        click.echo(f"wrote {path}", err=True)
    return True


def _rescue(data: bytes, name: str) -> str:
    """A result that cannot go where it should goes to the temporary directory instead."""
    import os
    import tempfile
    from contextlib import suppress

    path = ""
    try:
        handle, path = tempfile.mkstemp(prefix="servefit-", suffix=f"-{name}")
        with open(handle, "wb") as out:
            out.write(data)
    except OSError:
        with suppress(OSError):
            os.unlink(path)
        return "`loadgen export` gives it again once there is room"
    return f"it is kept as {path}"
