"""What all folders of tests share."""

import pytest

from tests.distributed.nursery import Nursery
from tests.guardian import guard_this_process


def pytest_configure() -> None:
    guard_this_process()


@pytest.fixture(scope="session")
def nursery() -> Nursery:
    """Worlds of new processes; see tests/worlds.py."""
    return Nursery()
