"""Where these tests run: on a GPU if there is one, or on what TEST_DEVICE says.

With TEST_DEVICE=cuda, which `make test-gpu` sets, it is an error if there is no GPU. With
TEST_DEVICE=cpu, all but those that ask for `cuda` run on a CPU, with gloo for NCCL.
"""

import os

import pytest
import torch

REQUESTED = os.environ.get("TEST_DEVICE")


def pytest_configure() -> None:
    if REQUESTED == "cuda" and not torch.cuda.is_available():
        pytest.exit("error: TEST_DEVICE=cuda (make test-gpu): torch sees no GPU", returncode=1)


@pytest.fixture
def device() -> str:
    if REQUESTED is None and not torch.cuda.is_available():
        pytest.skip("no GPU: make test-gpu where there is")
    return REQUESTED or "cuda"


@pytest.fixture
def cuda(device: str) -> str:
    if device != "cuda":
        pytest.skip("only CUDA has it")
    return device
