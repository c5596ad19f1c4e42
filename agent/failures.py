"""The edge where failures of ours become one line for the user and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

import click

from agent.words import printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def guarded(program: str, command: Callable[[], Any]) -> int:
    """Runs a click command (standalone_mode off) and returns its exit code; prints no traceback.

    With SERVEFIT_DEBUG set, an unforeseen exception is raised as it is.
    """
    # Closed by the caller (`>&-`): what is written goes nowhere, and is no reason to end.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    stdout = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows no “–” shows a question mark; it is no reason to end.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        result = command()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return _say(program, _one_line(error), 2)
    except (click.Abort, KeyboardInterrupt):
        return _say(program, "interrupted", 130)
    except (BrokenPipeError, SystemExit) as error:
        # The reader has gone (`| head`); click wraps the streams then, and exits with 1.
        if isinstance(error, SystemExit) and sys.stdout is stdout:
            raise
        abandon(sys.stdout)
        return 0
    except Exception as error:
        if os.environ.get("SERVEFIT_DEBUG"):
            raise
        from agent.model import ServefitError

        if isinstance(error, ServefitError):
            return _say(program, str(error), error.exit_code)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            abandon(sys.stdout)  # behind `> FILE`
            return _say(program, f"the output could not be written: {error.strerror}", 2)
        return _say(
            program,
            f"a defect of ours: {type(error).__name__}: {error}; "
            "SERVEFIT_DEBUG=1 shows where, please report it",
            2,
        )


def abandon(stream: TextIO | None) -> None:
    """Lets nothing more go to a stream that takes nothing more, not even the flush at the exit."""
    with suppress(OSError, ValueError, AttributeError):
        assert stream is not None
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _say(program: str, text: str, code: int) -> int:
    with suppress(OSError):
        print(f"{program}: {printable(text)}", file=sys.stderr)
    return code


def _one_line(error: click.ClickException) -> str:
    text = error.format_message()
    context = getattr(error, "ctx", None)
    if context is not None and isinstance(error, click.exceptions.NoArgsIsHelpError):
        text = f"which command? {', '.join(context.command.list_commands(context))}"
    if context is not None and isinstance(error, click.UsageError):
        text += f" (see `{context.command_path} --help`)"
    return text
