"""`--tokenizer`: counts tokens here, for servers that do not say how long a prompt was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.model import UsageError


def counter(path: str) -> Callable[[str], int]:
    """Counts the tokens of a text. `path`: a `tokenizer.json`, or a model's directory that has one.

    Raises UsageError where the extra `tokenizer` is not installed, or the file cannot be used.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError("--tokenizer needs an extra: pip install 'servefit[tokenizer]'") from error
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UsageError(f"--tokenizer {path}: there is no file {file}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise UsageError(f"--tokenizer {path}: not a tokenizer.json: {error}") from error
    return lambda text: len(tokenizer.encode(text).ids)
