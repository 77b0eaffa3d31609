"""One cluster for all tests of the folder."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, reason_to_skip


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    yield cluster
    cluster.close()
    shutil.rmtree(folder)
