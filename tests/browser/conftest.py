"""One browser for all tests of this folder; without one they are skipped, visibly."""

from collections.abc import Iterator

import pytest

from tests.browser import chromium


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Tab]:
    program = chromium.find()
    if program is None:
        pytest.skip(
            f"none of {', '.join(chromium.NAMES)} is on PATH: install your distribution's chromium,"
            " or name a browser with CHROMIUM=path"
        )
    with chromium.browser(program, tmp_path_factory.mktemp("profile")) as tab:
        yield tab
