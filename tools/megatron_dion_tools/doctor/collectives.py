"""Check that ranks compute sums and gather pieces together, with answers that are known."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from megatron_dion_tools.doctor.findings import Finding, failed, ok
from megatron_dion_tools.doctor.ranks import in_words
from megatron_dion_tools.doctor.world import World

_COUNT = 4096

_SUSPECT = "take the node out and try again without it; a GPU or a link corrupts data"


def rank_device() -> torch.device:
    """Name the device on which this process computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def open_group(world: World) -> Finding:
    """Make the process group that the other checks use, NCCL's or gloo's."""
    device = rank_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("group", world.open_store()),
        rank=world.rank,
        world_size=world.size,
        # Longer than a check may take: NCCL ends the process when this is over.
        timeout=timedelta(seconds=3 * world.patience),
    )
    return ok(f"{backend} on {device.type}", alike=True)


def close_group() -> Finding:
    """End it; a group that is left open makes NCCL complain."""
    dist.destroy_process_group()
    return ok("closed")


def all_reduce(world: World) -> Finding:
    """Sum what all ranks give, in integers: there is one right answer."""
    sums = _piece_of(world.rank)
    dist.all_reduce(sums)
    expected = _piece_of(0) * (world.size * (world.size + 1) // 2)
    wrong = int((sums != expected).sum())
    if wrong:
        return failed(f"{wrong} of {_COUNT} sums are wrong here", _SUSPECT)
    return ok(f"right sums over {world.size} ranks")


def all_gather(world: World) -> Finding:
    """Gather what all ranks give; wrong pieces tell whose they are."""
    pieces = [torch.zeros_like(_piece_of(0)) for _ in range(world.size)]
    dist.all_gather(pieces, _piece_of(world.rank))
    wrong = [r for r, piece in enumerate(pieces) if not torch.equal(piece, _piece_of(r))]
    if wrong:
        return failed(f"what comes from {in_words(wrong)} is wrong here", _SUSPECT)
    return ok(f"right pieces of {world.size} ranks")


def _piece_of(rank: int) -> torch.Tensor:
    return torch.arange(1, _COUNT + 1, device=rank_device()) * (rank + 1)
