"""Fixtures that several folders of tests share."""

from collections.abc import Iterator

import pytest

from tests.distributed.nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """The one process that has imported Megatron for the CPU; it forks worlds of ranks."""
    nursery = Nursery()
    yield nursery
    nursery.close()
