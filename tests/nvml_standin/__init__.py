"""A driver that is none: NVML's ABI in C (nvml.c), for machines without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.support import require

SOURCE = Path(__file__).with_name("nvml.c")


def compiled(folder: Path, *flags: str) -> Path:
    """Builds libnvidia-ml.so.1 in `folder`, for LD_LIBRARY_PATH; skips without a C compiler."""
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    require(cc, "a C compiler")
    assert cc is not None
    library = folder / "libnvidia-ml.so.1"
    warnings = ("-O1", "-Wall", "-Wextra", "-Werror")
    subprocess.run([cc, *warnings, "-shared", "-fPIC", *flags, "-o", library, SOURCE], check=True)
    return library
