"""servefit's measuring instrument: drives an OpenAI-compatible server, records what came back.

From Python: `loadgen.sweep(URL, concurrency=[1, 4, 16])`, `loadgen.run(URL)`, either with `_async`,
and `loadgen.load("latest")`; see `loadgen.library`, which is imported when one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadgen.library import load, run, run_async, sweep, sweep_async

__all__ = ["load", "run", "run_async", "sweep", "sweep_async"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loadgen import library

    return getattr(library, name)
