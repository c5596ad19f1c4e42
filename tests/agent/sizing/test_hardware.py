"""The catalogue: every row is usable, and a name means one device or is refused."""

from __future__ import annotations

import pytest

from agent.model import UsageError
from agent.sizing.hardware import GIB, gpu, gpus


def test_every_row_is_complete() -> None:
    assert len(gpus()) > 50
    for name, device in gpus().items():
        assert device.name == name
        assert device.memory_bytes >= 16 * GIB
        assert device.bandwidth_bytes_per_s > 1e11
        assert device.spec_source
        assert device.spec_confidence in ("high", "medium", "low")


def test_units() -> None:
    h100 = gpu("H100-SXM-80GB")
    assert h100.memory_bytes == 80 * 2**30
    assert h100.bandwidth_bytes_per_s == 3.35e12
    assert h100.flops_per_s("bf16") == 989e12
    assert h100.flops_per_s("fp8") == 1979e12
    assert h100.interconnect_bytes_per_s == 900e9
    assert gpu("b200").interconnect_bytes_per_s == 1.8e12
    assert gpu("dgx-spark").interconnect_bytes_per_s == 25e9  # 200 Gb/s
    assert gpu("l4").interconnect_bytes_per_s == 64e9
    assert gpu("apple-m4-max").interconnect_bytes_per_s is None


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("h100-sxm", "H100-SXM-80GB"),
        ("H100_sxm", "H100-SXM-80GB"),
        ("l4", "L4"),
        ("l40", "L40"),
        ("L40S", "L40S"),
        ("4090", "RTX-4090"),
        ("rtx 4090", "RTX-4090"),
        ("a100-sxm-80", "A100-SXM-80GB"),
        ("a100-sxm-40gb", "A100-SXM-40GB"),
        ("rtx-pro-6000", "RTX-PRO-6000"),
        ("mi250", "MI250"),
        ("m3-ultra", "Apple-M3-Ultra"),
    ],
)
def test_short_names(name: str, full: str) -> None:
    assert gpu(name).name == full


def test_every_full_name_means_itself() -> None:
    assert [gpu(name.lower()).name for name in gpus()] == list(gpus())


def test_ambiguous_name_lists_the_candidates() -> None:
    with pytest.raises(UsageError, match="A100-SXM-40GB or A100-SXM-80GB"):
        gpu("a100-sxm")


@pytest.mark.parametrize("name", ["h1000-sxm", "", "-"])
def test_unknown_name_names_the_nearest(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown GPU .* did you mean .*H100"):
        gpu(name)


def test_precision_without_units_computes_in_16_bits() -> None:
    a100 = gpu("a100-sxm-80")
    assert a100.flops_per_s("fp8") == a100.flops_per_s("bf16") == 312e12
    assert gpu("h100-sxm").flops_per_s("int4") == 989e12


def test_rate_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match="A16"):
        gpu("a16").flops_per_s("bf16")
    with pytest.raises(UsageError, match=r"did you mean .*fp8"):
        gpu("l4").flops_per_s("fp9")
