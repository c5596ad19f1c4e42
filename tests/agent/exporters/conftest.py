"""An outbox of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.exporters.outbox import Outbox


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    one = Outbox(tmp_path / "outbox.db")
    yield one
    one.close()
