"""The weights of a GPT as one rank holds them, and Dion on them."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.optimizer.binding import Distribution
from megatron_dion.sharding.collectives import Groups
from megatron_dion.sharding.layout import Rank
from megatron_dion_tools.plan import GptShape, place

LR, WEIGHT_DECAY = 1e-4, 0.1


def gpt(hidden: int, layers: int) -> GptShape:
    """Returns a gated GPT with heads of 64, without grouped queries; ffn is 8/3 x hidden."""
    ffn = 8 * hidden // 3 // 64 * 64
    heads = hidden // 64
    return GptShape(layers, hidden, ffn, heads, query_groups=heads)


def masters(shape: GptShape, device: str) -> list[Tensor]:
    """Returns all weights of a GPT, (rows, columns) each, float32, with gradients."""
    return [
        with_gradient(torch.nn.Parameter(0.02 * torch.randn(w.rows, w.columns, device=device)))
        for w in shape.weights(range(shape.layers))
    ]


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
        """Makes this rank's groups, in a process group of this size. A collective call."""
        ranks = torch.arange(self.size).view(self.dp, self.tp)
        return Groups(_group_with_me(ranks), _group_with_me(ranks.T))

    def rank(self, number: int) -> Rank:
        """Returns the coordinates of a rank of the process group."""
        return Rank(number % self.tp, number // self.tp)


def add_model_flags(parser: argparse.ArgumentParser, hidden: int, topologies: str) -> None:
    """Adds `--topologies`, `--hidden`, `--layers` and `--bucket-size`, with these defaults."""
    parser.add_argument(
        "--topologies",
        type=Topology.parse,
        nargs="+",
        default=[Topology.parse(one) for one in topologies.split()],
        metavar="TPxDP",
        help="under torchrun only those of its number of ranks are measured",
    )
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bucket-size", type=int, help="of Megatron, in elements; default: one")


def dion_on_pieces(
    shape: GptShape,
    topology: Topology,
    config: DionConfig,
    groups: Groups | None = None,
    device: str = "cpu",
    bucket_size: int | None = None,
) -> Dion:
    """Makes Dion on what a rank holds of a GPT in Megatron's layout, with gradients.

    Args:
        shape: the model; all of its layers are in one pipeline stage.
        topology: the ranks.
        config: hyperparameters.
        groups: what `topology.join` returned on this rank; None for a single process.
        device: `cpu` or `cuda`.
        bucket_size: elements of Megatron's buckets; None for one bucket.
    """
    placements = place(shape.weights(range(shape.layers), topology.tp), topology.dp, bucket_size)
    rank = topology.rank(dist.get_rank() if groups is not None else 0)
    tensors = {}
    for i, placement in enumerate(placements):
        start, stop = placement.piece(rank.data_parallel, topology.dp)
        if stop > start:
            tensors[i] = with_gradient(0.02 * torch.randn(stop - start, device=device))
    optimizer = Dion(
        [{"params": list(tensors.values())}], lr=LR, weight_decay=WEIGHT_DECAY, **vars(config)
    )
    optimizer.distribute(
        Distribution(placements, tensors, torch.device(device), groups or Groups())
    )
    return optimizer


def with_gradient(weight: Tensor) -> Tensor:
    """Gives the weight a random gradient, and returns it."""
    weight.grad = 1e-3 * torch.randn_like(weight)
    return weight


def checked_step(optimizer: Dion) -> None:
    """Steps as a plain Dion does, which looks for gradients that are not finite."""
    assert not optimizer.broken_gradients()
    optimizer.step()


def _group_with_me(lines: Iterable[Tensor]) -> dist.ProcessGroup | None:
    mine: Any = None  # new_group is typed as if it could return a number
    for line in lines:
        group = dist.new_group(line.tolist())  # all ranks must make all groups
        if dist.get_rank() in line:
            mine = group
    return mine
