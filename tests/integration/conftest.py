"""A real browser, one for all pages that the package writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import Page, find_browser, open_browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    executable = find_browser()
    if executable is None:
        pytest.skip("needs a browser of the Chromium family, as chromium-headless-shell")
    with open_browser(executable, tmp_path_factory.mktemp("profile")) as page:
        yield page
