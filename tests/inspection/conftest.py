"""What tests of the page share."""

from collections.abc import Iterator

import pytest
from browser import Browser, NoBrowserError


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all pages."""
    try:
        chromium = Browser()
    except NoBrowserError as error:
        pytest.skip(str(error))
    yield chromium
    chromium.close()
