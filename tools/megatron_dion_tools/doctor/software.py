"""Checks of what is installed in this Python."""

import hashlib
import importlib
import importlib.util
import platform
from importlib.metadata import distributions

import torch

from megatron_dion.megatron import launch
from megatron_dion.megatron.errors import ConfigurationError
from megatron_dion_tools.doctor.findings import FAILED, OK, WARNING, Finding
from megatron_dion_tools.doctor.gpus import count_gpus


def packages() -> Finding:
    """All ranks must have the same Python and packages, of which Megatron uses what it finds."""
    installed = sorted(f"{one.name}=={one.version}" for one in distributions())
    digest = hashlib.sha256("\n".join(installed).encode()).hexdigest()[:8]
    python = f"Python {platform.python_version()} on {platform.machine()}"
    return Finding(OK, f"{python}, {len(installed)} packages, fingerprint {digest}", same=True)


def pytorch() -> Finding:
    """Torch must have NCCL where there are GPUs."""
    cuda, text = torch.version.cuda, torch.__version__
    if cuda and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return Finding(OK, f"{text}, built for CUDA {cuda} with NCCL {nccl}", same=True)
    if count_gpus():
        return Finding(FAILED, f"{text} without NCCL", "install a torch that is built for CUDA")
    return Finding(OK, f"{text}, built for CPU", same=True)


def megatron() -> Finding:
    """Megatron-core must be the tested version."""
    try:
        launch.check_megatron_version()
    except ConfigurationError as error:
        what, _, fix = str(error).rpartition(": ")
        return Finding(FAILED, what, fix)
    return Finding(OK, f"megatron-core {launch.TESTED_MEGATRON_CORE}")


def transformer_engine() -> Finding:
    """Transformer Engine is wanted on GPUs and in the way on CPU; half of it breaks Megatron."""
    if importlib.util.find_spec("transformer_engine") is None:
        if count_gpus():
            fix = "use NVIDIA's PyTorch container, or see docs/fp8.md"
            return Finding(WARNING, "not installed: Megatron's local layers, no FP8", fix)
        return Finding(OK, "not installed, and not needed on CPU")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a missing library is an OSError, a missing symbol another error
        fix = "build its extension against this torch (docs/fp8.md), or uninstall all of it"
        return Finding(FAILED, f"megatron-core fails to import it: {error}", fix)
    if not count_gpus():
        text = "without a CUDA device megatron-core takes layers and an Adam that need one"
        return Finding(WARNING, text, "to train on CPU, use an environment without it")
    return Finding(OK, "installed")
