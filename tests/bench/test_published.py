"""The bench's reading of published rows: what is left out, medians, and what shows the KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.sizing import fit
from tests.bench import published

HEAD = (
    "source,model,params_b,precision,gpu,n_gpus,engine,isl,osl,concurrency_or_rate,output_tok_s,"
    "total_tok_s,ttft_ms,tpot_ms,power_w,notes"
)


def row(load: str, rate: float | str, *, model: str = "meta-llama/Llama-3.1-8B", osl: int = 100,
        gpu: str = "H100-SXM-80GB", ttft: float | str = "", tpot: float | str = "",
        engine: str = "vllm 0.12.0", notes: str = "") -> str:  # fmt: skip
    return f"t@1,{model},8,fp16,{gpu},1,{engine},100,{osl},{load},{rate},,{ttft},{tpot},,{notes}"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


def write(table: Path, *rows: str) -> Path:
    table.write_text("\n".join([HEAD, *rows]))
    return table


def test_several_values_of_one_setting_are_their_median(table: Path) -> None:
    (group,), left_out = published.read(
        write(table, *(row("c=8", rate) for rate in (100, 130, 500)), row("c=16", 200))
    )
    assert [point.output_tokens_per_s for point in group.points] == [130, 200]
    assert (group.gpu, group.family, group.spec.precision) == ("H100-SXM-80GB", "vllm", "bf16")
    assert not left_out


def test_rows_that_cannot_be_scored_are_counted_by_reason(table: Path) -> None:
    groups, left_out = published.read(write(
        table,
        row("c=8", 100, model="nobody/heard-of-it"),
        row("c=8", 100, model="meta-llama/Llama-3.1-70B"),
        row("c=8", 100, notes="POWER-CAPPED H100"),
        row("c=8", 500, ttft=100, tpot=50),  # 8 · 100 tokens in 5 s are 160/s
        row("c=8", ""),
    ))  # fmt: skip
    assert not groups
    assert sorted(left_out) == [
        "it tells no output rate",
        "its GPU was power-capped on purpose",
        "its model's shape is not in the table of models",
        "its rate and its latencies contradict each other by over 25 %",
        "its weights exceed the memory it says it ran on",
    ]


def test_a_rate_that_only_latencies_tell_is_worked_out(table: Path) -> None:
    (group,), _ = published.read(write(table, row("c=8", "", ttft=100, tpot=10)))
    assert group.points[0].output_tokens_per_s == pytest.approx(8 * 100 / (0.1 + 99 * 0.01))


@pytest.mark.parametrize(
    ("ttft_at_64", "truth"), [(30.0, False), (1000.0, True)], ids=["decodes", "waits"]
)
def test_decoding_that_stops_growing_shows_the_cache(
    table: Path, ttft_at_64: float, truth: bool
) -> None:
    """Of 64 requests 32 wait: half their time passes before the first token."""
    rows = row("c=32", "", ttft=20, tpot=10), row("c=64", "", ttft=ttft_at_64, tpot=10)
    (shown,) = published.kv_sweeps(published.read(write(table, *rows))[0])
    assert (shown.truth, shown.said) == (truth, False)  # a prompt of 100 tokens takes no cache


def test_a_flat_rate_shows_the_cache_where_shorter_answers_rise(table: Path) -> None:
    rates = {(100, 16): 800, (100, 32): 1500, (4000, 16): 600, (4000, 32): 610}
    rows = [row(f"static batch={b}", rate, osl=osl) for (osl, b), rate in rates.items()]
    shown = {one.load.output_tokens: one.truth
             for one in published.kv_sweeps(published.read(write(table, *rows))[0])}  # fmt: skip
    assert shown == {100: False, 4000: True}


@pytest.mark.parametrize(
    ("name", "family"),
    [("vLLM (Splitwise 2023)", "vllm"), ("trtllm 1.0.0rc3", "tensorrt-llm"),
     ("TensorRT-LLM 0.12.0", "tensorrt-llm"), ("sglang 0.5.9", "sglang"),
     ("Deepspeed-MII", "deepspeed-mii")],
)  # fmt: skip
def test_an_engine_is_one_whatever_its_version(name: str, family: str) -> None:
    assert published.family(name) == family


def test_the_packages_constants_are_those_of_the_table() -> None:
    """What the published rows have in common, as `agent.sizing.fit.TYPICAL` keeps it."""
    if not published.TABLE.exists():
        pytest.skip(f"no published benchmarks at {published.TABLE}")
    groups, _ = published.read(published.TABLE)
    for vendor, kept in fit.TYPICAL.items():
        learned = published.typical(groups, lambda _: True, vendor)
        for name in fit.NAMES:
            assert getattr(kept, name) == pytest.approx(getattr(learned, name), rel=0.03), name


def test_what_no_row_shows_is_neither_reached_nor_missed(table: Path) -> None:
    rows = [row(f"c={n}", 80 * n / (1 + n / 100)) for n in (1, 2, 4, 8, 16, 32)]
    other = write(table.with_name("other.csv"), row("c=64", 3500))
    figures, _ = published.outcome(write(table, *rows), other)
    said = {one.what.split(":")[0]: one for one in figures}
    assert said["same GPU, each length and load in turn"].value is not None
    assert "(7 rows)" in said["same GPU, failed fits too"].what
    for name in ("another GPU, all rows", "another engine", "another vendor"):
        assert (said[name].value, said[name].reached) == (None, None)
