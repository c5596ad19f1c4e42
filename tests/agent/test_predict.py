"""`agent predict`: the command, its files, and what is wrong with what it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.cli import main
from agent.model import encode
from agent.sizing.hardware import gpu
from tests.agent.sizing.test_predict import sweep

Command = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent.parent
LOAD = ("--input-tokens", "1000", "--output-tokens", "300", "--concurrency", "1,8,64")
ASK = ("--gpu", "h100-sxm", "--model", "llama-3.1-8b", *LOAD)
CONFIG = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "model_type": "llama",
}  # fmt: skip


def predict(capsys: Command, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(("predict", *args))
    out, err = capsys.readouterr()
    assert "defect" not in err
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_a_table_for_people(capsys: Command) -> None:
    code, out, err = predict(capsys, *ASK)
    assert (code, err) == (0, "")
    assert out.startswith("llama-3.1-8b in bf16 on 1 x H100-SXM-80GB, vllm; requests of 1,000")
    assert [line.split()[0] for line in out.splitlines()[4:]] == ["clients", "1", "8", "64"]


def test_json_for_programs(capsys: Command, tmp_path: Path) -> None:
    code, out, _ = predict(capsys, *ASK, "--json", "-")
    assert code == 0
    found = json.loads(out)
    assert [level["concurrency"] for level in found["levels"]] == [1, 8, 64]
    assert found["refused"] is None
    one = found["levels"][0]["ttft_ms"]
    assert one["lo90"] < one["value"] < one["hi90"]
    file = tmp_path / "predicted.json"
    assert predict(capsys, *ASK, "--json", str(file))[:2] == (0, "")
    assert json.loads(file.read_bytes()) == found


def test_a_refusal_is_an_answer(capsys: Command) -> None:
    args = ("--gpu", "l4", "--model", "meta-llama/Llama-3.1-70B-Instruct", *LOAD)
    code, out, err = predict(capsys, *args, "--json", "-")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["levels"] == []
    assert "131.4 GiB" in found["refused"]
    code, out, _ = predict(capsys, *args)
    assert (code, out.splitlines()[1].partition(":")[0]) == (0, "refused")


def test_a_sweep_of_another_vendor_is_refused(capsys: Command, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    file.write_bytes(encode(sweep()))
    args = ("--model", "llama-3.1-8b", *LOAD, "--calibrate", str(file), "--json", "-")
    near = json.loads(predict(capsys, "--gpu", "h200-sxm", *args)[1])
    far = json.loads(predict(capsys, "--gpu", "mi300x", *args)[1])
    assert near["refused"] is None
    assert "H100-SXM-80GB" in near["assumed"]["basis"]
    assert far["levels"] == []
    assert "vendor" in far["refused"]


def test_a_config_json_is_a_model(capsys: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "config.json"
    file.write_text(json.dumps(CONFIG))
    named = json.loads(predict(capsys, *ASK, "--json", "-")[1])
    for path in (file, file.parent):
        args = ("--gpu", "h100-sxm", "--model", str(path), *LOAD, "--json", "-")
        found = json.loads(predict(capsys, *args)[1])
        assert found["assumed"]["model"] == "mine"
        assert found["levels"] == named["levels"]


def test_the_name_of_a_checkpoint_tells_its_precision(capsys: Command) -> None:
    args = ("--gpu", "h100-sxm", "--model", "openai/gpt-oss-20b", *LOAD, "--json", "-")
    assert json.loads(predict(capsys, *args)[1])["assumed"]["precision"] == "mxfp4"


def test_gpus_of_ones_own(capsys: Command) -> None:
    example = str(ROOT / "config/gpus.example.csv")
    args = ("--model", "llama-3.1-8b", *LOAD, "--gpus-file", example, "--json", "-")
    found = json.loads(predict(capsys, "--gpu", "rtx-4090-48gb", *args)[1])
    assert found["assumed"]["gpu"] == "RTX-4090-48GB"
    held = found["assumed"]["kv_capacity_tokens"]
    args = ("--gpu", "RTX-4090", "--model", "llama-3.1-8b", *LOAD, "--json", "-")
    assert held > 3 * json.loads(predict(capsys, *args)[1])["assumed"]["kv_capacity_tokens"]
    assert gpu("rtx-4090").name == "RTX-4090"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--gpu", "h1000"], "unknown GPU 'h1000'; did you mean H100"),
        (["--model", "llama-9"], "unknown model"),
        (["--model", "BROKEN"], "--model"),
        (["--model", "EMPTY"], "num_hidden_layers"),
        (["--model", "/nowhere/config.json"], "No such file"),
        (["--precision", "fp9"], "did you mean fp8"),
        (["--concurrency", "1,zwei"], "write numbers above 0"),
        (["--concurrency", "nan"], "write numbers above 0"),
        (["--input-tokens", "0"], "--input-tokens"),
        (["--gpus", "4", "--tp", "3"], "tp times replicas"),
        (["--engine", "triton"], "unknown engine"),
        (["--calibrate", "/nowhere.json"], "No such file"),
        (["--calibrate", "EMPTY"], "not a sweep"),
        (["--measured-tp", "2"], "give it with --calibrate"),
        (["--gpus-file", "BAD"], "line 2: memory_gb should be a number above 0, not 'x'; line 3: "),
        (["--json", "/nowhere/x.json"], "No such file"),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: Command, tmp_path: Path, args: list[str], said: str
) -> None:
    contents = {
        "BROKEN": ("broken.json", "{"),
        "EMPTY": ("empty.json", "{}"),
        "BAD": ("bad.csv", "gpu,vendor,memory_gb,bandwidth_gbs\nA,B,x,1\nC,D,1,-1\n"),
    }
    given = []
    for word in args:
        if word in contents:
            name, text = contents[word]
            (tmp_path / name).write_text(text)
            word = str(tmp_path / name)
        given.append(word)
    code, out, err = predict(capsys, *ASK, *given)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err
