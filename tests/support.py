"""What the tests share: how a test says what it needs of the machine it runs on."""

from __future__ import annotations

import os

import pytest


def require(condition: object, what: str) -> None:
    """Skips the test unless `condition` holds; `what` says what is missing, as the skip's reason.

    With SERVEFIT_REQUIRE_REAL=1 (continuous integration, a release) a missing part is a failure,
    so that a check cannot vanish unseen.
    """
    if condition:
        return
    if os.environ.get("SERVEFIT_REQUIRE_REAL") == "1":
        pytest.fail(f"needs {what}, and SERVEFIT_REQUIRE_REAL=1 allows no skip")
    pytest.skip(f"needs {what}")
