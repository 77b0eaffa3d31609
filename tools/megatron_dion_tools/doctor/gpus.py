"""Checks of the GPUs of a machine.

nvidia-smi is asked first. It makes no CUDA context, which would take hundreds of megabytes of a
GPU on which somebody trains while a container's health is checked.
"""

import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_dion_tools.doctor.findings import Finding, failed, ok, warning
from megatron_dion_tools.doctor.machine import size

_FIELDS = "name memory.total driver_version clocks.sm clocks.max.sm clocks_event_reasons.active"
_QUERY = (
    "nvidia-smi",
    f"--query-gpu={','.join(_FIELDS.split())}",
    "--format=csv,noheader,nounits",
)

# Bits of NVML's clock event reasons that mean a fault of power or cooling. The others are idling,
# settings, and the ordinary power cap of a GPU at work.
THROTTLING = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True)
class Gpu:
    """What is known of one GPU; the last four only from nvidia-smi.

    Attributes:
        name: Of the model.
        memory: In bytes.
        driver: Its version.
        clock: Of the multiprocessors, now, in MHz.
        highest_clock: What it can reach.
        reasons: NVML's bits that say why it is not there.
    """

    name: str
    memory: int
    driver: str = "unknown"
    clock: int = 0
    highest_clock: int = 0
    reasons: int = 0


def count_gpus() -> int:
    """The CUDA devices that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def read_gpus() -> list[Gpu]:
    """Ask nvidia-smi, or torch where there is none."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return [_from_torch(index) for index in range(count_gpus())]
    return parse_gpus(answer.stdout)


def parse_gpus(csv: str) -> list[Gpu]:
    """Read the answer of nvidia-smi; a value that it does not know counts as zero."""
    return [_parse_line(line) for line in csv.splitlines() if line.strip()]


def gpus(usable: int, expected: int | None, seen: Sequence[Gpu]) -> Finding:
    """Are there as many as were paid for?

    Args:
        usable: The number that torch can use.
        expected: The number that there should be, if it is known.
        seen: What the driver lists.
    """
    if not usable and not seen:
        return ok("no CUDA device") if not expected else failed("no CUDA device", _MISSING)
    kinds = Counter(f"{gpu.name}, {size(gpu.memory)}, driver {gpu.driver}" for gpu in seen)
    text = "; ".join(f"{number} x {kind}" for kind, number in kinds.items())
    if not usable:
        return failed(f"{text}, but torch can use none", "compare torch's CUDA with the driver's")
    if expected is not None and usable != expected:
        return failed(f"torch can use {usable}, not {expected}: {text}", _MISSING)
    if len(kinds) > 1:
        return warning(text, "the slowest will set the pace: use nodes of one kind")
    return ok(text)


_MISSING = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; docker run --gpus all"


def gpu_clocks(seen: Sequence[Gpu]) -> Finding:
    """A GPU that is hot or short of power slows down all the others."""
    known = [gpu for gpu in seen if gpu.highest_clock]
    if not known:
        return ok("unknown: nvidia-smi did not tell" if seen else "no CUDA device")
    slow = [
        f"GPU {index} at {gpu.clock} of {gpu.highest_clock} MHz ({', '.join(faults)})"
        for index, gpu in enumerate(seen)
        if (faults := [text for bit, text in THROTTLING.items() if gpu.reasons & bit])
    ]
    if slow:
        return warning("; ".join(slow), "look after cooling and power; take the node out till then")
    clocks = [gpu.clock for gpu in known]
    return ok(f"{min(clocks)} to {max(clocks)} MHz now, none is held back")


def _parse_line(line: str) -> Gpu:
    name, memory, driver, clock, highest_clock, reasons = (part.strip() for part in line.split(","))
    return Gpu(
        name,
        _number(memory) * 2**20,
        driver,
        _number(clock),
        _number(highest_clock),
        _number(reasons),
    )


def _number(text: str) -> int:
    try:
        return int(text, base=0)
    except ValueError:  # "[N/A]"
        return 0


def _from_torch(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, properties.total_memory)
