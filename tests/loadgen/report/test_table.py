"""CSV: the same columns for every run, and text from outside stays in its cell."""

from __future__ import annotations

import csv
import io

import msgspec

from agent.model import Level, Measurement, Requests, Run, Sweep, Target, Workload
from loadgen.report.table import flatten, levels_csv, levels_parquet
from tests.loadgen.report import samples


def sweep(*levels: Level, model: str = "m", url: str = "u") -> Sweep:
    run = Run("r", "2026-01-01T00:00:00Z", "loadgen sweep", 0, "0", "h")
    return Sweep(run, Target(url, model), Workload("chat", "1", "1"), [], [*levels])


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def header(text: str) -> list[str]:
    return next(csv.reader(io.StringIO(text)))


def some_sweeps() -> list[Sweep]:
    found = [getattr(samples, name) for name in dir(samples) if not name.startswith("_")]
    made = [value() for value in found if callable(value) and _is_sweep_maker(value)]
    return [value for value in [*found, *made] if isinstance(value, Sweep)]


def _is_sweep_maker(value: object) -> bool:
    return getattr(value, "__annotations__", {}) in ({"return": "Sweep"}, {"return": Sweep})


def test_the_columns_are_the_same_for_every_run() -> None:
    sweeps = some_sweeps()
    bare = sweep(Level(concurrency=1, output_tokens_per_s=10.0))
    full = [*sweeps, sweep(), bare, sweep(Level(mode="rate", offered_rps=0.5))]
    headers = {tuple(header(levels_csv(one))) for one in full}
    assert len(headers) == 1
    assert len(full) > 4
    [columns] = headers
    assert len(set(columns)) == len(columns)
    for name in (
        "run_id", "model", "mode", "concurrency", "offered_rps", "output_tokens_per_s",
        "requests.ok", "requests.errors", "ttft_ms.p95", "itl_ms.p95", "measurement.valid",
        "measurement.send_lag_ms.p99", "server.kv_usage_max", "gpu.power_w_mean", "tokens.source",
    ):  # fmt: skip
        assert name in columns


def test_a_row_a_level_with_its_numbers() -> None:
    level = Level(
        concurrency=4, output_tokens_per_s=123.456,
        output_tokens_per_s_ci95=(120.0, 126.5),
        requests=Requests(9, 3, 1, {"cut": 2, "http_429": 1}),
        measurement=Measurement(False, ["errors: many", "unsteady: much"]),
    )  # fmt: skip
    [row, bare] = read(levels_csv(sweep(level, Level(concurrency=8))))
    assert row["concurrency"] == "4"
    assert row["output_tokens_per_s"] == "123.456"
    assert row["output_tokens_per_s_ci95"] == "120.0; 126.5"
    assert row["requests.errors"] == "cut=2; http_429=1"
    assert row["measurement.reasons"] == "errors: many; unsteady: much"
    assert bare["output_tokens_per_s"] == ""  # not measured is empty, never zero
    assert bare["requests.ok"] == ""


def test_an_invalid_level_is_marked_with_the_number_that_decides() -> None:
    rows = {row["concurrency"]: row for row in read(levels_csv(samples.sweep()))}
    assert rows["192"]["measurement.valid"] == "True"
    assert rows["192"]["measurement.reasons"] == ""
    assert rows["256"]["measurement.valid"] == "False"
    decides = "send lag p99 34 ms is above the bound of 5 ms"
    assert rows["256"]["measurement.reasons"] == decides
    assert rows["256"]["measurement.send_lag_ms.p99"] == "34.0"


def test_hostile_names_stay_in_their_cell() -> None:
    evil = 'a,b"c\nd;\r\n=cmd|calc\u2028é'
    one = sweep(Level(concurrency=1), Level(concurrency=2), model=evil, url=evil)
    rows = read(levels_csv(one))
    assert len(rows) == 2
    assert {row["concurrency"] for row in rows} == {"1", "2"}
    for row in rows:
        assert row["model"] == row["url"]
        assert row["model"].replace("\r\n", "\n") == evil.replace("\r\n", "\n")


def test_flatten() -> None:
    value = {"a": 1, "b": {"c": None, "d": [1, "x"]}}
    assert dict(flatten(value)) == {"a": 1, "b.c": None, "b.d": "1; x"}


def test_every_number_of_the_json_has_a_column() -> None:
    """Whoever adds a field to a level finds it in the table; GPUs are summed up in columns."""
    columns = set(header(levels_csv(sweep())))
    for name in msgspec.structs.fields(Level):
        assert name.name == "gpu" or any(
            column == name.name or column.startswith(name.name + ".") for column in columns
        )


def test_parquet_holds_what_csv_holds() -> None:
    from pyarrow import parquet

    measured = samples.sweep()
    table = parquet.read_table(io.BytesIO(levels_parquet(measured)))
    rows = list(csv.DictReader(io.StringIO(levels_csv(measured))))
    assert table.column_names == list(rows[0])
    assert table.column("output_tokens_per_s").to_pylist() == [
        float(row["output_tokens_per_s"]) for row in rows
    ]
