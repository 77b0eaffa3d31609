"""The finding of a check, and the checks of what one rank has: software, limits, GPUs."""

import hashlib
import importlib
import importlib.util
import platform
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_dion.megatron import capabilities
from megatron_dion.megatron.errors import ConfigurationError

OK, WARNING, FAILED = VERDICTS = ("ok", "warning", "failed")  # the worst is last
GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
# Packages with kernels that Megatron's training can use, and what happens without them.
INSTEAD = {
    "apex": "norms and Adam are Transformer Engine's, or torch's",
    "fused_weight_gradient_mlp_cuda": "local layers need --no-gradient-accumulation-fusion",
    "flash_attn": "Transformer Engine's attention is cuDNN's, or unfused",
    "deep_ep": "no --moe-token-dispatcher-type flex",
    "nvidia_resiliency_ext": "--async-save needs --async-strategy mcore",
}


class Finding(NamedTuple):
    """What one check says on one rank.

    Attributes:
        verdict: `OK`; `WARNING`, if training can go on, slower or with less than it could have;
            `FAILED`, if training cannot go on, or its results cannot be trusted.
        text: What there is, in a few words.
        fix: What to do about it; empty if nothing has to be done.
        same: All ranks must find the same text.
        ended: False for a check that raised or took too long. Later checks cannot use what such a
            check shares with them, for example a process group.
    """

    verdict: str
    text: str
    fix: str = ""
    same: bool = False
    ended: bool = True


Check = Callable[[], Finding]


def count_gpus() -> int:
    """Return the number of CUDA devices that torch can use; a broken driver may never answer."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


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
    """Megatron-core must have all that Dion needs."""
    try:
        version, is_tested = capabilities.check_megatron()
    except ConfigurationError as error:
        what, _, fix = str(error).rpartition(": ")
        return Finding(FAILED, what, fix)
    if is_tested:
        return Finding(OK, f"megatron-core {version}")
    return Finding(WARNING, f"megatron-core {version}, which is not tested", capabilities.FIX)


def transformer_engine() -> Finding:
    """Transformer Engine is wanted on GPUs and in the way on CPU; half of it breaks Megatron."""
    if importlib.util.find_spec("transformer_engine") is None:
        if count_gpus():
            fix = "use NVIDIA's PyTorch container, or see docs/fp8.md"
            return Finding(
                WARNING, "not installed: Megatron's local layers, no FP8, no grouped GEMM", fix
            )
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


def kernels() -> Finding:
    """Beside Transformer Engine, Megatron takes kernels from what it can import, without a word."""
    there = {name for name in INSTEAD if importlib.util.find_spec(name)}
    if "apex" in there and importlib.util.find_spec("amp_C") is None:
        text = "apex is not NVIDIA's, or has no CUDA kernels: Megatron's local layers fail by it"
        has_other_layers = importlib.util.find_spec("transformer_engine") is not None
        return Finding(WARNING if has_other_layers else FAILED, text, "pip uninstall apex")
    if not count_gpus():
        return Finding(OK, "none is used on CPU")
    missing = [f"{name} ({instead})" for name, instead in INSTEAD.items() if name not in there]
    text = f"{', '.join(sorted(there)) or 'none'}; not installed: {', '.join(missing) or 'none'}"
    return Finding(OK, text)


def limits() -> Finding:
    """Sockets and files count as open files; network cards with RDMA need locked memory."""
    files, locked = (
        float("inf") if (soft := resource.getrlimit(kind)[0]) == resource.RLIM_INFINITY else soft
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
    )
    text = f"{files} open files, {locked / GIB:.3g} GiB of locked memory"
    if files < 8192:
        return Finding(WARNING, text, "ulimit -n 65536; docker run --ulimit nofile=65536")
    if locked < 8 * GIB and count_gpus():
        fix = "ulimit -l unlimited; docker run --ulimit memlock=-1; for slurmd LimitMEMLOCK"
        return Finding(WARNING, f"{text}: InfiniBand may fail to register its buffers", fix)
    return Finding(OK, text)


def shared_memory() -> Finding:
    """NCCL and the workers of data loaders pass buffers through shared memory."""
    total = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else 0
    text = f"{total / GIB:.3g} GiB in {SHARED_MEMORY}"
    if total < GIB:
        return Finding(WARNING, text, "docker run --ipc=host, or --shm-size=16g")
    return Finding(OK, text)


def gpus(expected: int | None) -> Finding:
    """Are there as many GPUs as there should be, and are they of one kind?

    nvidia-smi makes no CUDA context, which would take hundreds of megabytes of a GPU on which
    somebody trains while the health of a container is checked.
    """
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    kinds, usable = Counter(listed.splitlines()), count_gpus()
    text = "; ".join(f"{number} x {kind}" for kind, number in kinds.items())
    text = text or (f"{usable} GPUs" if usable else "no CUDA device")
    if expected is not None and usable != expected:
        fix = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; docker run --gpus all"
        return Finding(FAILED, f"torch can use {usable} GPUs, not {expected}: {text}", fix)
    if listed and not usable:
        fix = "compare torch's CUDA version with the driver's"
        return Finding(FAILED, f"{text}, but torch can use none", fix)
    if len(kinds) > 1:
        return Finding(WARNING, text, "use GPUs of one kind: the slowest sets the pace")
    return Finding(OK, text)
