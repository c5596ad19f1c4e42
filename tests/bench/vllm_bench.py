"""vLLM's own benchmark, run by the interpreter that has vLLM: `vllm bench serve` and its options.

Not by the command `vllm`, because the CPU build's torchvision may be made for another torch and
fail on import (as in `loadgen/targets/in_vllm/server.py`); a text benchmark needs none of it.
"""

from __future__ import annotations

import argparse
import sys

for name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]

if __name__ == "__main__":
    from vllm.benchmarks.serve import add_cli_args, main  # type: ignore[import-not-found]

    parser = argparse.ArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args())
