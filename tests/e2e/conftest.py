"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.e2e.running_agent import Page


@pytest.fixture
def page() -> Iterator[Page]:
    one = Page()
    thread = threading.Thread(target=one.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield one
    one.http.shutdown()
    one.http.server_close()
    thread.join()
