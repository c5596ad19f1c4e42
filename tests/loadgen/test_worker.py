"""What a worker asks of the machine. What it does of a level is tested in test_crew.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOOK = """
import os, subprocess, sys, threading
from loadgen.worker import ask_for_the_processor
ask_for_the_processor()
def policy():
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
seen = [policy()]
thread = threading.Thread(target=lambda: seen.append(policy()))
thread.start(); thread.join()
child = "import os; print(os.sched_getscheduler(0), os.nice(0))"
print(seen, subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_RR"), reason="no real-time policies on this system")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root is given the processor")
def test_the_measuring_thread_alone_is_served_first() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    try:
        subprocess.run([sys.executable, "-c", "import os; os.sched_setscheduler(0, os.SCHED_RR, "
                        "os.sched_param(1))"], check=True, capture_output=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a container without CAP_SYS_NICE")
    assert done.stdout.split("\n")[0] == f"[{os.SCHED_RR}, {os.SCHED_OTHER}] {os.SCHED_OTHER} 0"
