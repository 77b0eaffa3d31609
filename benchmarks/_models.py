"""The weights that are stepped, and Dion on this rank's pieces of them."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.optimizer.binding import Distribution
from megatron_dion.sharding import Groups, Placement, Rank
from megatron_dion_tools.plan import GptShape, place

LR, WEIGHT_DECAY = 1e-4, 0.1


def gpt(hidden: int, layers: int) -> GptShape:
    """A gated GPT with heads of 64, without grouped queries, four thirds of 2 x hidden wide."""
    ffn = 8 * hidden // 3 // 64 * 64
    heads = hidden // 64
    return GptShape(layers, hidden, ffn, heads, query_groups=heads)


@dataclass(frozen=True)
class Topology:
    """Tensor-parallel ranks side by side, then data-parallel ones."""

    tp: int = 1
    dp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Reads `2x4`."""
        tp, dp = map(int, text.split("x"))
        return cls(tp, dp)

    @property
    def size(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        return f"TP{self.tp} x DP{self.dp}"

    def join(self) -> Groups:
        """On a rank of a process group of that size: its groups. A collective call."""
        ranks = torch.arange(self.size).view(self.dp, self.tp)
        return Groups(_group_with_me(ranks), _group_with_me(ranks.T))

    def rank(self, number: int) -> Rank:
        """The coordinates of a rank of the process group."""
        return Rank(number % self.tp, number // self.tp)


def add_topologies(
    parser: argparse.ArgumentParser, default: str, takes_ranks: bool = False
) -> None:
    """Adds `--topologies`, one or more of TPxDP.

    Args:
        parser: of a benchmark.
        default: what is measured without it.
        takes_ranks: whether the benchmark takes those of torchrun.
    """
    parser.add_argument(
        "--topologies",
        type=Topology.parse,
        nargs="+",
        default=[Topology.parse(one) for one in default.split()],
        metavar="TPxDP",
        help="under torchrun those of its number of ranks are measured" if takes_ranks else None,
    )


def _group_with_me(lines: Iterable[Tensor]) -> dist.ProcessGroup | None:
    mine: Any = None  # new_group is typed as if it could return a number
    for line in lines:
        group = dist.new_group(line.tolist())  # all ranks must make all groups
        if dist.get_rank() in line:
            mine = group
    return mine


def dion_on_pieces(
    shape: GptShape,
    topology: Topology,
    config: DionConfig,
    groups: Groups | None = None,
    device: str = "cpu",
    bucket_size: int | None = None,
) -> Dion:
    """Dion on what a rank holds of a GPT in Megatron's layout, with gradients.

    Args:
        shape: the model; all of its layers are in one pipeline stage.
        topology: the ranks.
        config: hyperparameters.
        groups: what `topology.join` gave on this rank, None for a single process.
        device: `cpu` or `cuda`.
        bucket_size: elements of Megatron's buckets, None for one bucket.
    """
    placements = place(shape.weights(range(shape.layers), topology.tp), topology.dp, bucket_size)
    rank = topology.rank(dist.get_rank() if groups is not None else 0)
    tensors = pieces(placements, topology, rank, device)
    optimizer = Dion(
        [{"params": list(tensors.values())}], lr=LR, weight_decay=WEIGHT_DECAY, **vars(config)
    )
    optimizer.distribute(
        Distribution(placements, tensors, torch.device(device), groups or Groups())
    )
    return optimizer


def pieces(
    placements: list[Placement], topology: Topology, rank: Rank, device: str
) -> dict[int, Tensor]:
    """A rank's flat pieces of weights, float32, with gradients, by the placements' indices."""
    bounds = [placement.piece(rank.data_parallel, topology.dp) for placement in placements]
    found = {i: stop - start for i, (start, stop) in enumerate(bounds) if stop > start}
    return {
        i: with_gradient(0.02 * torch.randn(numel, device=device)) for i, numel in found.items()
    }


def with_gradient(weight: Tensor) -> Tensor:
    """The weight, now with a random gradient."""
    weight.grad = 1e-3 * torch.randn_like(weight)
    return weight


def checked_step(optimizer: Dion) -> None:
    """A step as within Megatron, where gradients are checked before it."""
    optimizer.check_gradients()
    optimizer.step()
