"""The catalogue: every row is usable, and a name means one device or is refused."""

from __future__ import annotations

import pytest

from agent.model import UsageError
from agent.sizing.hardware import (
    _DRIVER_NAMES,
    GIB,
    device,
    gpu,
    gpus,
    precision,
    read_gpus,
)


def test_every_row_is_complete() -> None:
    assert len(gpus()) > 50
    for name, one in gpus().items():
        assert one.name == name
        assert one.memory_bytes >= 16 * GIB
        assert one.bandwidth_bytes_per_s > 1e11
        assert one.tdp_w
        assert one.spec_source
        assert one.spec_confidence in ("high", "medium", "low")


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


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("H100 SXM5", "H100-SXM-80GB"),
        ("h100sxm", "H100-SXM-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("A100-SXM-40GB?", "A100-SXM-40GB"),
        ("V100-SXM2-32GB", "V100-SXM2-32GB"),
        ("rtx4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Gaudi 3", "Gaudi3"),
        ("Tesla T4", "T4"),
        ("GB10", "DGX-Spark-GB10"),
    ],
)
def test_the_names_of_drivers_and_shops(name: str, full: str) -> None:
    assert gpu(name).name == full


@pytest.mark.parametrize(
    ("name", "short"),
    [("BFloat16", "bf16"), ("bf16/fp16", "bf16"), ("half", "fp16"), (" FP8 ", "fp8"),
     ("nvfp4", "fp4"), ("AWQ", "int4"), ("fp9", "fp9")],
)  # fmt: skip
def test_precisions_as_tables_call_them(name: str, short: str) -> None:
    assert precision(name) == short


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


# ----------------------------------------------------------------------------- a user's own devices

OWN = """\
# comment

gpu,vendor,memory_gb,bandwidth_gbs,bf16_dense_tflops,interconnect
Lab-1,ACME,48, 900,180,PCIe4
H100-SXM-80GB,NVIDIA,96,4000,989,NVLink4 900 GB/s
"""


def test_own_devices_add_to_the_catalogue_and_take_the_place_of_its_own() -> None:
    own = read_gpus(OWN)
    lab = gpu("lab-1", own)
    assert (lab.memory_bytes, lab.bandwidth_bytes_per_s) == (48 * GIB, 9e11)
    assert lab.flops == {"bf16": 180e12}
    assert lab.interconnect_bytes_per_s == 64e9
    assert lab.tdp_w is None
    assert gpu("h100-sxm", own).memory_bytes == 96 * GIB
    assert gpu("l4", own) == gpu("l4")
    assert "Lab-1" not in gpus()


def test_every_bad_line_is_named_with_what_is_wrong() -> None:
    header, *_ = OWN.splitlines()[2:]
    bad = ["A,ACME,much,900,,", "B,ACME,48,-1,,", ",ACME,48,900,,", "C,ACME,48", "D,,48,900,,"]
    with pytest.raises(UsageError) as caught:
        read_gpus(
            "\n".join(["# mine", header, *bad, "E,ACME,8,100,inf,", "F,X,1,1,,", "F,X,1,1,,"])
        )
    said = str(caught.value).split("; ")
    assert [one.split(":")[0] for one in said] == [f"line {n}" for n in (3, 4, 5, 6, 7, 8, 10)]
    for one, named in zip(
        said,
        ["'much'", "'-1'", "gpu is empty", "3 fields", "vendor is empty", "'inf'", "twice"],
        strict=True,
    ):
        assert named in one


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column gpu, vendor, memory_gb, bandwidth_gbs"),
        ("gpu,vendor,bandwidth_gbs\nA,B,1", "no column memory_gb"),
        ("gpu,vendor,memory_gb,bandwidth_gbs,tdp\n", "did you mean tdp_w"),
    ],
)
def test_a_file_of_another_form_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_gpus(text)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("H200-SXM-141GB", "H200-SXM-141GB"),
    ],
)
def test_what_drivers_call_a_device(name: str, full: str) -> None:
    found = device(name)
    assert found is not None
    assert found.name == full


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100", "", "Radeon"])
def test_a_device_that_is_not_in_the_catalogue_is_none_of_it(name: str) -> None:
    assert device(name) is None


def test_every_driver_name_leads_to_the_catalogue() -> None:
    for name in _DRIVER_NAMES:
        assert device(name) is not None
