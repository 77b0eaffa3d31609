"""A check of the GPUs of a machine, asked of nvidia-smi.

nvidia-smi makes no CUDA context, which would take hundreds of megabytes of a GPU on which somebody
trains while the health of a container is checked.
"""

import subprocess
from collections import Counter

import torch

from megatron_dion_tools.doctor.findings import FAILED, OK, WARNING, Finding

FIELDS = "name,memory.total,driver_version,clocks.sm,clocks.max.sm,clocks_event_reasons.active"
# Bits of NVML's clock event reasons that mean a fault of power or cooling. The other bits mean
# idling, settings, and the ordinary power cap of a busy GPU.
FAULTS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def count_gpus() -> int:
    """Return the number of CUDA devices that torch can use; a broken driver may never answer."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpus(expected: int | None) -> Finding:
    """Are there as many GPUs as there should be, of one kind, and is none of them slowed down?

    Args:
        expected: Their number, if it is known.
    """
    usable, listed = count_gpus(), _listed_by_driver()
    kinds = Counter(f"{name}, {size} MiB, driver {driver}" for name, size, driver, *_ in listed)
    text = "; ".join(f"{number} x {kind}" for kind, number in kinds.items())
    text = text or (f"{usable} GPUs" if usable else "no CUDA device")
    if expected is not None and usable != expected:
        fix = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; docker run --gpus all"
        return Finding(FAILED, f"torch can use {usable} GPUs, not {expected}: {text}", fix)
    if listed and not usable:
        fix = "compare torch's CUDA version with the driver's"
        return Finding(FAILED, f"{text}, but torch can use none", fix)
    slow = [fault for index, gpu in enumerate(listed) if (fault := _throttled(index, *gpu[3:]))]
    if slow:
        fix = "look after cooling and power, and take the node out till then"
        return Finding(WARNING, "; ".join(slow), fix)
    if len(kinds) > 1:
        return Finding(WARNING, text, "use GPUs of one kind: the slowest sets the pace")
    return Finding(OK, text)


def _listed_by_driver() -> list[list[str]]:
    """Return the values of `FIELDS` for each GPU, and no GPU where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [[value.strip() for value in line.split(",")] for line in answer.stdout.splitlines()]


def _throttled(index: int, clock: str, highest: str, reasons: str) -> str:
    bits = int(reasons, base=0) if reasons.startswith("0x") else 0  # some drivers say "[N/A]"
    faults = ", ".join(text for bit, text in FAULTS.items() if bits & bit)
    return f"GPU {index} at {clock} of {highest} MHz ({faults})" if faults else ""
