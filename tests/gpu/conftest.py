"""Skips this folder, visibly, where there is no GPU to test."""

from importlib.util import find_spec

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"{reason}: make test-gpu where there is"))


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if find_spec("transformer_engine") is None:
        return "there is no Transformer Engine"
    return None
