"""Checks of what is installed in this Python."""

import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_dion.megatron import environment
from megatron_dion.megatron.errors import ConfigurationError
from megatron_dion_tools.doctor.findings import Finding, Verdict, failed, ok, warning

OLDEST_PYTHON = (3, 12)
OLDEST_TORCH = (2, 6)

# What Megatron takes where it is installed, and runs without.
OPTIONAL_KERNELS = (
    "triton",
    "emerging_optimizers",
    "flash_attn",
    "flash_attn_3",
    "flashinfer",
    "grouped_gemm",
    "mamba_ssm",
    "causal_conv1d",
    "fla",
    "deep_ep",
    "nvidia_resiliency_ext",
)


def python(found: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """The interpreter must be one that megatron-core runs on."""
    text = f"{_dotted(found)}, {platform.machine()}"
    if found < OLDEST_PYTHON:
        return failed(text, f"use Python >= {_dotted(OLDEST_PYTHON)}")
    return ok(text, alike=True)


def pytorch(found: str = torch.__version__, cuda: str | None = torch.version.cuda) -> Finding:
    """Torch must be new enough; a GPU container's own is."""
    text = f"{found}, built for {f'CUDA {cuda}' if cuda else 'CPU'}"
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH:
        return failed(text, f"install torch >= {_dotted(OLDEST_TORCH)}")
    return ok(text, alike=True)


def megatron_core() -> Finding:
    """Only the tested version will do."""
    return _as_environment_says(
        environment.check_megatron_version,
        f"{_version('megatron-core')}, tested is {environment.TESTED_MEGATRON_CORE}",
    )


def transformer_engine(gpus: int) -> Finding:
    """It is fast on GPUs, in the way on CPU, and worse than none if it is half installed."""
    found = _version("transformer-engine")
    if importlib.util.find_spec("transformer_engine") is None:
        if gpus:
            return warning(
                "not installed: Megatron's local layers, no FP8",
                "use NVIDIA's PyTorch container, or see docs/fp8.md",
            )
        return ok("not installed, and not wanted on CPU", alike=True)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library that is missing is an OSError, a symbol something else
        return failed(
            f"{found} cannot be imported: {error}",
            "build its extension against this torch (docs/fp8.md) or uninstall all of it:"
            " megatron-core fails on it otherwise",
        )
    if not gpus:
        return warning(
            f"{found}, but no CUDA device: megatron-core takes layers and an Adam that need one",
            "to train on CPU, use an environment without it",
        )
    return ok(found, alike=True)


def apex() -> Finding:
    """NVIDIA's will do, and none; a web toolkit of that name will not."""
    installed = importlib.util.find_spec("apex") is not None
    return _as_environment_says(
        environment.check_apex,
        f"{_version('apex')}, NVIDIA's" if installed else "not installed",
    )


def nccl(gpus: int) -> Finding:
    """GPUs of several ranks need it."""
    if torch.distributed.is_nccl_available() and torch.version.cuda:
        text = _dotted(torch.cuda.nccl.version())
        return ok(text if gpus else f"{text}, not used on CPU", alike=True)
    if gpus:
        return failed("this torch is built without NCCL", "install a torch that is built for CUDA")
    return ok("none, and not used on CPU", alike=True)


def optional_kernels() -> Finding:
    """Which of them there are; all ranks must compute with the same ones."""
    there = [name for name in OPTIONAL_KERNELS if importlib.util.find_spec(name)]
    missing = [name for name in OPTIONAL_KERNELS if name not in there]
    return ok(f"{', '.join(there) or 'none'} (not there: {', '.join(missing)})", alike=True)


def _as_environment_says(check: Callable[[], None], found: str) -> Finding:
    """Takes the verdict from a check of the training script, whose errors end in `: fix`."""
    try:
        check()
    except ConfigurationError as error:
        what, _, fix = str(error).rpartition(": ")
        return Finding(Verdict.FAILED, what, fix)
    return ok(found, alike=True)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown version"


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))
