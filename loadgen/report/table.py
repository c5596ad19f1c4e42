"""Levels as a table, CSV or Parquet: one row a level, the names of `--json` joined by dots."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import msgspec

from agent.model import Lag, Level, Measurement, ServerView, Sweep, Tokens, UsageError


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts; lists become one cell, joined by `; `."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list | tuple):
        yield prefix, "; ".join(str(item) for item in value)
    else:
        yield prefix, value


def levels_csv(sweep: Sweep) -> str:
    """CSV with a header; columns of the same name and order for every run.

    Of `requests.errors` the kinds are joined in one cell, of `gpu` the devices are summed or
    maximised into `gpu.*` columns: a table has one row a level.
    """
    rows = [_row(sweep, level) for level in sweep.levels]
    header = list(rows[0]) if rows else list(_row(sweep, Level()))
    out = io.StringIO()
    writer = csv.DictWriter(out, header, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def levels_parquet(sweep: Sweep) -> bytes:
    """The same table as Parquet. Raises UsageError where the extra `parquet` is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError("Parquet needs an extra: pip install 'servefit[parquet]'") from error
    out = io.BytesIO()
    rows = [_row(sweep, level) for level in sweep.levels]
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def _row(sweep: Sweep, level: Level) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(level)
    gpu = plain.pop("gpu")
    errors = (plain.get("requests") or {}).pop("errors", {})
    row: dict[str, Any] = {
        "run_id": sweep.run.id,
        "model": sweep.target.model,
        "url": sweep.target.url,
        "simulated": sweep.run.simulated,
    }
    for group, shape in _SHAPES.items():
        if plain.get(group) is None:
            plain[group] = shape
    row.update(flatten(plain))
    row["requests.errors"] = "; ".join(f"{kind}={n}" for kind, n in errors.items())
    row["gpu.power_w_mean"] = _total(gpu, "power_w_mean")
    row["gpu.energy_j"] = _total(gpu, "energy_j")
    row["gpu.memory_used_bytes_max"] = _total(gpu, "memory_used_bytes_max")
    return row


def _total(gpu: list[dict[str, Any]], name: str) -> float | None:
    values = [view[name] for view in gpu if view.get(name) is not None]
    return sum(values) if values else None


def _shapes() -> dict[str, Any]:
    """The null forms of optional groups, so that every run has the same columns."""

    def nulls(struct: msgspec.Struct) -> dict[str, Any]:
        return {key: None for key in msgspec.to_builtins(struct)}

    lag = nulls(Lag())
    return {
        "requests": {"ok": None, "failed": None, "cancelled": None},
        "tokens": nulls(Tokens(0, 0, 0, "usage")),
        "measurement": nulls(Measurement(True, [])) | {"send_lag_ms": lag, "loop_lag_ms": lag},
        "server": nulls(ServerView()),
        "request_throughput_ci95": [],
        "output_tokens_per_s_ci95": [],
    }


_SHAPES = _shapes()
