"""Skips this folder, visibly, where there is no GPU to test.

With REQUIRE_GPU_TESTS in the environment (`make test-gpu`) a run without a passed test has failed.
"""

import os
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


_passed: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _passed.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "REQUIRE_GPU_TESTS" in os.environ and not _passed:
        print("no test on a GPU has run")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if find_spec("transformer_engine") is None:
        return "there is no Transformer Engine"
    return None
