"""Fixtures of the end-to-end tests, and those of them that run together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.running_agent import Page, serving_page
from tests.e2e.together import Together, is_waiting


@pytest.fixture
def page() -> Iterator[Page]:
    with serving_page() as one:
        yield one


@pytest.fixture(scope="session")
def together(
    settled: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Together]:
    one = Together(request.session.items, tmp_path_factory)
    yield one
    one.close()


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not is_waiting(pyfuncitem):
        return None
    one = pyfuncitem.funcargs["together"]
    assert isinstance(one, Together)
    one.end(pyfuncitem)
    return True
