"""The edge where failures of ours become one line for the user and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click


def guarded(program: str, command: Callable[[], Any]) -> int:
    """Runs a click command (standalone_mode off) and returns its exit code; prints no traceback.

    With SERVEFIT_DEBUG set, an unforeseen exception is raised as it is.
    """
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
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing to say, and nothing to flush at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("SERVEFIT_DEBUG"):
            raise
        from agent.model import ServefitError

        if isinstance(error, ServefitError):
            return _say(program, str(error), error.exit_code)
        return _say(
            program,
            f"a defect of ours: {type(error).__name__}: {error}; "
            "SERVEFIT_DEBUG=1 shows where, please report it",
            2,
        )


def _say(program: str, text: str, code: int) -> int:
    print(f"{program}: {' '.join(text.split())}", file=sys.stderr)
    return code


def _one_line(error: click.ClickException) -> str:
    text = error.format_message()
    context = getattr(error, "ctx", None)
    if context is not None and isinstance(error, click.UsageError):
        text += f" (see `{context.command_path} --help`)"
    return text
