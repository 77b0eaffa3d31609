"""Checks of what ranks compute and send together, with known answers."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from megatron_dion_tools.doctor.checks import FAILED, OK, Finding
from megatron_dion_tools.doctor.mailbox import Mailbox
from megatron_dion_tools.doctor.report import ranges

COUNT = 4096
MESSAGES = 2**24  # bytes that a rank sends to all others together
SUSPECT = "take the node out and try again without it: a GPU or a link corrupts data"


def open_group(mailbox: Mailbox, seconds: float) -> Finding:
    """Make the process group that the other checks use, of NCCL or gloo.

    A check of this group may take so many seconds.
    """
    backend = "nccl" if _device().type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("group", mailbox.connect()),
        rank=mailbox.rank,
        world_size=mailbox.size,
        timeout=timedelta(seconds=3 * seconds),  # after it NCCL ends the process
    )
    return Finding(OK, f"{backend} on {_device().type}", same=True)


def all_reduce(rank: int, size: int) -> Finding:
    """Sum integers of all ranks, so that there is one right answer."""
    numbers = torch.arange(1, COUNT + 1, device=_device())
    sums = numbers * (rank + 1)
    dist.all_reduce(sums)
    if wrong := int((sums != numbers * (size * (size + 1) // 2)).sum()):
        return Finding(FAILED, f"{wrong} of {COUNT} sums are wrong here", SUSPECT)
    return Finding(OK, f"right sums over {size} ranks")


def messages(rank: int, size: int) -> Finding:
    """Send each rank a message of its own, as Dion does with the parts of P."""
    count = max(MESSAGES // size, 1)
    sent = torch.cat([_message(rank, count) for _ in range(size)])
    received = torch.zeros_like(sent)
    dist.all_to_all_single(received, sent)
    parts = enumerate(received.chunk(size))
    if wrong := [peer for peer, part in parts if not torch.equal(part, _message(peer, count))]:
        return Finding(FAILED, f"messages from rank {ranges(wrong)} arrive corrupted", SUSPECT)
    return Finding(OK, f"messages of {size} ranks arrive as they were sent")


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _message(sender: int, count: int) -> torch.Tensor:
    return ((torch.arange(count, device=_device()) + sender) % 251).to(torch.uint8)
