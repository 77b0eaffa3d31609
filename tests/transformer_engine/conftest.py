"""Puts torch in the place of Transformer Engine's kernels, or skips where it is not installed."""

from importlib.util import find_spec

import pytest

from tests.worlds import in_host


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    if find_spec("transformer_engine") is None:
        pytest.skip(
            "Transformer Engine is not installed here: tools/build_transformer_engine.sh, then"
            " make test-te"
        )
    in_host(_replace_kernels)


def _replace_kernels() -> None:
    # Imports Transformer Engine, which the process of the tests does without.
    from tests.transformer_engine import kernels

    kernels.install()
