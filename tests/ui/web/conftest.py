"""The page on the demo model, and a browser: one server and one browser for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("web") / "outputs"


@pytest.fixture(scope="module")
def url(outputs: Path) -> Iterator[str]:
    from tilewise.ui.web.common.safety import Address, Limits
    from tilewise.ui.web.server import serving

    with serving(["demo"], outputs, Address(port=0), Limits(work=64 * 64 * 9 * 1000, waiting=2)) as where:
        yield where


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from page_visitor import chromium

    with chromium() as running:
        yield running


@pytest.fixture
def visitor(browser: Any, url: str) -> Iterator[Any]:
    from page_visitor import Visitor

    one = Visitor(browser, url)
    yield one
    one.close()
