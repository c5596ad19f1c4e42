"""A real vLLM on this machine is found, recognised and told in the words of the README."""

from __future__ import annotations

import asyncio
import re

from loadgen import find


def test_a_real_vllm_is_found(real_vllm: str) -> None:
    port = int(real_vllm.rpartition(":")[2])
    [found] = asyncio.run(find.look({}, [port]))
    assert found.url == real_vllm
    assert found.engine == "vllm"
    assert found.problem == ""
    assert re.fullmatch(rf"vllm \d+\.\d+\S* with model \S+ on {real_vllm}", found.line())
