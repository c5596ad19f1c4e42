"""Runs tests that mostly wait several at a time: a measurement of 40 s takes a tenth of a core.

A test says so by `@waiting`. It then may take nothing but `tmp_path` and its own parameters, for
its body runs on a thread: the bodies of all selected ones begin with the first that is asked for,
and each test ends as its own body ended. They stand behind all tests that need a core for
themselves (tests/conftest.py), so nothing else runs meanwhile.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeGuard

import pytest

AT_A_TIME = 3  # a client and a simulated server each: a third of a core in the mean

waiting = pytest.mark.usefixtures("together")


def is_waiting(item: pytest.Item) -> TypeGuard[pytest.Function]:
    return isinstance(item, pytest.Function) and "together" in item.fixturenames


class Together:
    """The bodies of the waiting tests of a session, at work or done."""

    def __init__(self, items: list[pytest.Item], folders: pytest.TempPathFactory) -> None:
        self._threads = ThreadPoolExecutor(AT_A_TIME)
        self._bodies: dict[str, Future[Any]] = {}
        for item in items:
            if is_waiting(item):
                values = dict(item.callspec.params) if hasattr(item, "callspec") else {}
                folder = folders.mktemp(item.originalname)
                self._bodies[item.nodeid] = self._threads.submit(
                    item.obj, **values, tmp_path=folder
                )

    def end(self, item: pytest.Item) -> None:
        """Waits for the body of one test; raises what it raised."""
        self._bodies[item.nodeid].result()

    def close(self) -> None:
        """Waits for those at work; those that have not begun never will."""
        self._threads.shutdown(cancel_futures=True)
