"""Dion on shards of any grid of ranks against the dense float64 reference. Without Megatron."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm.reference import ReferenceMatrix
from megatron_dion.optimizer.binding import Distribution
from megatron_dion.sharding import Groups, Part, Placement, Rank, Rectangle, Weight
from tests.distributed.world import gloo_world

LR, WEIGHT_DECAY, STEPS = 0.02, 0.1, 10


@dataclass(frozen=True)
class Shape:
    """A whole parameter: what a single rank would hold."""

    name: str
    rows: int
    columns: int
    partition_dim: int | None
    fusion: str = "none"

    def weight(self, tp: int) -> Weight:
        """The weight of a tensor-parallel rank."""
        rows = self.rows // tp if self.partition_dim == 0 else self.rows
        columns = self.columns // tp if self.partition_dim == 1 else self.columns
        split = self.partition_dim if tp > 1 else None
        separate = self.fusion == "heads"
        return Weight(self.name, rows, columns, split, tp, self._parts(rows), separate)

    def _parts(self, local_rows: int) -> tuple[Part, ...]:
        if self.fusion == "qkv":  # three groups of two queries of 4 rows, a key, a value
            return (Part("query", 8), Part("key", 4), Part("value", 4))
        if self.fusion == "heads":  # the same rows, head by head
            return (Part("query.0", 4), Part("query.1", 4), Part("key", 4), Part("value", 4))
        if self.fusion == "swiglu":
            return (Part("gate", local_rows // 2), Part("up", local_rows // 2))
        return ()

    def local(self, whole: Tensor, tp: int, rank: int) -> Tensor:
        """A tensor-parallel rank's part of the whole parameter, as Megatron lays it out."""
        if self.partition_dim is None:
            return whole
        if self.fusion == "swiglu":
            return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
        return whole.chunk(tp, dim=self.partition_dim)[rank]

    def matrices(self, whole: Tensor) -> dict[str, Tensor]:
        """The logical matrices of the whole parameter."""
        if self.fusion == "qkv":
            groups = whole.unflatten(0, (-1, 16))
            parts = {"query": groups[:, :8], "key": groups[:, 8:12], "value": groups[:, 12:]}
            return {f"{self.name}[{k}]": v.flatten(0, 1) for k, v in parts.items()}
        if self.fusion == "heads":
            names = [f"{k}.{g}" for g in range(3) for k in ("query.0", "query.1", "key", "value")]
            return {f"{self.name}[{n}]": h for n, h in zip(names, whole.split(4), strict=True)}
        if self.fusion == "swiglu":
            gate, up = whole.chunk(2)
            return {f"{self.name}[gate]": gate, f"{self.name}[up]": up}
        return {self.name: whole}


TRANSFORMER = (
    Shape("qkv", 48, 36, 0, "qkv"),
    Shape("proj", 36, 48, 1),
    Shape("fc1", 200, 36, 0, "swiglu"),
    Shape("fc2", 36, 100, 1),
    Shape("duplicated", 20, 36, None),
)
ODD = (
    Shape("one_row", 1, 60, 1),
    Shape("one_column", 24, 1, 0),
    Shape("few_rows", 4, 500, None),
    Shape("long_rows", 12, 480, 1),
    Shape("tiny", 12, 12, 0),
)


def place(shapes: tuple[Shape, ...], tp: int, dp: int, bucket: int) -> list[Placement]:
    """Megatron's layout: parameters 64-aligned, buckets padded to a multiple of the ranks."""
    placements: list[Placement] = []
    pending: list[tuple[Weight, int]] = []
    position = 0
    for index, shape in enumerate(shapes):
        weight = shape.weight(tp)
        position = math.ceil(position / 64) * 64
        pending.append((weight, position))
        position += weight.rows * weight.columns
        if position >= bucket or index == len(shapes) - 1:
            multiple = math.lcm(dp, 128)
            numel = math.ceil(position / multiple) * multiple
            placements += [Placement(weight, start, numel) for weight, start in pending]
            pending, position = [], 0
    return placements


def values(shapes: tuple[Shape, ...], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        shape.name: torch.randn(shape.rows, shape.columns, generator=generator) for shape in shapes
    }


def piece(
    shape: Shape, placement: Placement, whole: Tensor, tp: int, dp: int, rank: Rank
) -> Tensor | None:
    start, stop = placement.piece(rank.data_parallel, dp)
    if start == stop:
        return None
    return shape.local(whole, tp, rank.tensor_parallel).flatten()[start:stop].clone()


def train_shards(
    tp: int, dp: int, shapes: tuple[Shape, ...], config: DionConfig, bucket: int
) -> list[tuple[str, Rectangle, Tensor, Tensor, Tensor, slice]]:
    """On one rank: ten steps; returns its blocks of weights, momenta and right factors."""
    rank = Rank(dist.get_rank() % tp, dist.get_rank() // tp)
    tensor_groups = [dist.new_group([d * tp + t for t in range(tp)]) for d in range(dp)]
    data_groups = [dist.new_group([d * tp + t for d in range(dp)]) for t in range(tp)]
    placements = place(shapes, tp, dp, bucket)

    def pieces(seed: int) -> dict[int, Tensor]:
        wholes = values(shapes, seed)
        found = {
            index: piece(shape, placements[index], wholes[shape.name], tp, dp, rank)
            for index, shape in enumerate(shapes)
        }
        return {index: tensor for index, tensor in found.items() if tensor is not None}

    tensors = pieces(seed=0)
    optimizer = Dion(
        [{"params": list(tensors.values())}], lr=LR, weight_decay=WEIGHT_DECAY, **vars(config)
    )
    optimizer.distribute(
        Distribution(
            placements,
            tensors,
            torch.device("cpu"),
            Groups(tensor_groups[rank.data_parallel], data_groups[rank.tensor_parallel]),
        )
    )
    for step in range(1, STEPS + 1):
        for index, gradient in pieces(seed=step).items():
            tensors[index].grad = gradient
        optimizer.step()
    return [
        (
            *(held.matrix.name, held.rectangle),
            *(held.tensors.weight, held.tensors.momentum, held.tensors.kept_right),
            held.tensors.kept_columns,
        )
        for held in optimizer.held_blocks()
    ]


def reference(
    shapes: tuple[Shape, ...], config: DionConfig, steps: int = STEPS
) -> dict[str, ReferenceMatrix]:
    matrices = {
        name: ReferenceMatrix.start(name, weight, config)
        for shape in shapes
        for name, weight in shape.matrices(values(shapes, 0)[shape.name]).items()
    }
    for step in range(1, steps + 1):
        wholes = values(shapes, step)
        for shape in shapes:
            for name, gradient in shape.matrices(wholes[shape.name]).items():
                matrices[name].step(gradient, LR, WEIGHT_DECAY, config)
    return matrices


def _distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / (want.norm() + 1e-3))


def compare(results: list, expected: dict[str, ReferenceMatrix], tolerance: float) -> None:
    """Every element is held by some rank, agrees, and is bitwise equal to its other copies."""
    rights: dict[tuple[str, int, int, int], Tensor] = {}
    seen = {name: torch.zeros_like(matrix.weight) for name, matrix in expected.items()}
    for blocks in results:
        for name, place, weight, momentum, right, columns in blocks:
            want = expected[name]
            rows = slice(place.row_start, place.row_stop)
            held = (rows, slice(place.column_start, place.column_stop))
            seen[name][held] += 1
            assert _distance(weight, want.weight[held]) < tolerance, name
            assert _distance(momentum, want.momentum[held]) < tolerance, name
            for row, values in enumerate(right, place.row_start):
                key = (name, row, columns.start, columns.stop)
                assert torch.equal(rights.setdefault(key, values), values), name
            if not right.numel():
                continue
            # A single column of Q is as ill-conditioned as B's smallest direction; Q P^T is not.
            assert _distance(right, want.right_factor[rows, columns]) < 100 * tolerance, name
    assert all(count.min() >= 1 for count in seen.values())


GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2)]


@pytest.mark.parametrize(("tp", "dp"), GRIDS)
@pytest.mark.parametrize("shapes", [TRANSFORMER, ODD], ids=["transformer", "odd"])
def test_any_grid_equals_the_reference(tp: int, dp: int, shapes: tuple[Shape, ...]) -> None:
    config = DionConfig(rank_fraction=0.3, seed=7)
    results = gloo_world(tp * dp, train_shards, tp, dp, shapes, config, 5000)
    compare(results, reference(shapes, config), tolerance=1e-5)


@pytest.mark.parametrize("fraction", [0.01, 1.0])
@pytest.mark.parametrize("method", ["rcqr", "cqr", "qr"])
def test_options_equal_the_reference(fraction: float, method: str) -> None:
    config = DionConfig(
        rank_fraction=fraction, orthonormalizer=method, scale_mode="dion", momentum=0.8
    )
    results = gloo_world(4, train_shards, 2, 2, TRANSFORMER[1:], config, 10**9)
    compare(results, reference(TRANSFORMER[1:], config), tolerance=2e-5)


@pytest.mark.parametrize("fusion", ["qkv", "heads"])
@pytest.mark.parametrize(("tp", "dp"), [(3, 1), (2, 2)])
def test_query_groups_on_any_number_of_tensor_ranks(fusion: str, tp: int, dp: int) -> None:
    shapes = (Shape("qkv", 48, 36, 0, fusion),)
    config = DionConfig(rank_fraction=0.5)
    results = gloo_world(tp * dp, train_shards, tp, dp, shapes, config, 10**9)
    compare(results, reference(shapes, config), tolerance=1e-5)


def test_comparison_notices_another_momentum() -> None:
    config = DionConfig(rank_fraction=0.3)
    results = gloo_world(2, train_shards, 1, 2, TRANSFORMER, config, 5000)
    with pytest.raises(AssertionError):
        compare(results, reference(TRANSFORMER, replace(config, momentum=0.9)), tolerance=1e-5)
