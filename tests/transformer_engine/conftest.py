from importlib.util import find_spec

import pytest

from tests.distributed.nursery import Nursery


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Nursery:
    """The nursery, in which the kernels of Transformer Engine are torch's."""
    if find_spec("transformer_engine") is None:
        pytest.skip(
            "Transformer Engine is not installed here: tools/build_transformer_engine.sh, then"
            " make test-te"
        )
    # Only now: it takes seconds to start.
    nursery: Nursery = request.getfixturevalue("nursery")
    nursery.call(_emulate)
    return nursery


def _emulate() -> None:
    # Imports Transformer Engine, which the process of the tests does without.
    from tests.transformer_engine import kernels

    kernels.install()
