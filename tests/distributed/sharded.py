"""What the tests of Dion on shards share: weights, grids of ranks, steps, and the comparison."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.optimizer.binding import Distribution
from megatron_dion.optimizer.diagnostics import MatrixDiagnostics
from megatron_dion.sharding.blocks import Rectangle
from megatron_dion.sharding.collectives import Groups
from megatron_dion.sharding.layout import Placement, Rank
from megatron_dion.sharding.matrices import Part, Weight
from tests.reference import ReferenceMatrix
from tests.worlds import world

LR, WEIGHT_DECAY, STEPS = 0.02, 0.1, 10
# Matrix, place, weight, momentum, right factor and which columns of it are stored.
BlockState = tuple[str, Rectangle, Tensor, Tensor, Tensor, slice]


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


@dataclass(frozen=True)
class Mesh:
    """Ranks: tensor-parallel ones side by side, then data-parallel ones, then replicas."""

    tp: int
    dp: int
    replicas: int = 1

    @property
    def size(self) -> int:
        return self.tp * self.dp * self.replicas

    def join(self) -> tuple[Rank, int, Groups]:
        """On a rank: its coordinates, its replica, its groups."""
        ranks = torch.arange(self.size).view(self.replicas, self.dp, self.tp)
        mine = dist.get_rank()
        replica, d, t = (int(i) for i in (ranks == mine).nonzero()[0])
        lines = [*ranks.flatten(0, 1), *ranks.mT.flatten(0, 1), *ranks.flatten(1).T]
        groups = [dist.new_group(line.tolist()) for line in lines]
        mine_in = [group for line, group in zip(lines, groups, strict=True) if mine in line]
        return Rank(t, d), replica, Groups(*mine_in)


@dataclass
class Result:
    """What a rank reports.

    Attributes:
        blocks: what it has of matrices.
        sent: bytes that the last step handed to collectives for other ranks.
        planned: the same as the plan says.
        state_bytes: of momenta and right factors.
        buffer_bytes: of the two largest sets of a step, which are under way at a time.
        diagnostics: of the last step.
    """

    blocks: list[BlockState]
    sent: int
    planned: int
    state_bytes: int
    buffer_bytes: int
    diagnostics: list[MatrixDiagnostics]


def train_shards(
    mesh: Mesh,
    shapes: tuple[Shape, ...],
    config: DionConfig,
    bucket: int,
    gradients_of: Callable[[tuple[Shape, ...], int], dict[str, Tensor]] = values,
    device: str = "cpu",
) -> Result:
    """On one rank: ten steps, of which the last is measured."""
    rank, replica, groups = mesh.join()
    placements = place(shapes, mesh.tp, mesh.dp, bucket)

    def pieces(wholes: dict[str, Tensor]) -> dict[int, Tensor]:
        """This rank's part of each parameter of which it has any."""
        spans = [placement.piece(rank.data_parallel, mesh.dp) for placement in placements]
        return {
            index: shape.local(wholes[shape.name], mesh.tp, rank.tensor_parallel)
            .flatten()[start:stop]
            .to(device, copy=True)
            for index, (shape, (start, stop)) in enumerate(zip(shapes, spans, strict=True))
            if start < stop
        }

    tensors = pieces(values(shapes, seed=0))
    optimizer = Dion(list(tensors.values()), lr=LR, weight_decay=WEIGHT_DECAY, **vars(config))
    optimizer.distribute(Distribution(placements, tensors, torch.device(device), groups))
    sent = 0
    for step in range(1, STEPS + 1):
        other = differences(shapes, step, replica, mesh.replicas)
        wholes = {k: v + other.get(k, 0) for k, v in gradients_of(shapes, step).items()}
        for index, gradient in pieces(wholes).items():
            tensors[index].grad = gradient
        with counted_bytes() as counter:
            optimizer.step()
        if step == STEPS - 1:
            sent = counter.total()
            optimizer.diagnose_next_step()
    return Result(
        blocks=list(blocks_of(optimizer, tensors, rank)),
        sent=sent,
        planned=optimizer.bind().bytes_per_step(),
        state_bytes=sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        buffer_bytes=sum(sorted(each.exchange.nbytes for each in optimizer.bind().sets)[-2:]),
        diagnostics=optimizer.take_diagnostics(),
    )


def blocks_of(optimizer: Dion, tensors: dict[int, Tensor], rank: Rank) -> Iterator[BlockState]:
    """What a rank has, rectangle by rectangle."""
    right_factors = optimizer.bind().right_factors()
    for index, tensor in tensors.items():
        for rectangle in optimizer.bind().layout.rectangles(index, rank):
            matrix, place, columns, right, _ = next(right_factors)
            assert place == rectangle
            weight, momentum = (
                flat[place.offset : place.offset + place.numel].view(place.rows, place.columns)
                for flat in (tensor, optimizer.state[tensor]["momentum"])
            )
            yield matrix.name, place, weight.cpu(), momentum.cpu(), right.cpu(), columns


def differences(
    shapes: tuple[Shape, ...], step: int, replica: int, replicas: int
) -> dict[str, Tensor]:
    """What makes the gradients of a replica another one; zero in the mean."""
    if replicas == 1:
        return {}
    drawn = [values(shapes, 1000 * step + i) for i in range(replicas)]
    return {
        shape.name: 2 * (drawn[replica][shape.name] - sum(d[shape.name] for d in drawn) / replicas)
        for shape in shapes
    }


@contextmanager
def counted_bytes() -> Iterator[Counter[str]]:
    """Counts the bytes that this rank hands to collectives for others, as rings send them."""
    sent: Counter[str] = Counter()

    def ring(name: str, factor: int) -> Callable[..., Any]:
        stock = getattr(dist, name)

        def counting(*args: Any, group: Any, **options: Any) -> Any:
            tensor = args[0] if name == "all_reduce" else args[1]
            share = (group.size() - 1) / (1 if name == "all_gather_into_tensor" else group.size())
            sent[name] += int(factor * tensor.nbytes * share)
            return stock(*args, group=group, **options)

        return counting

    def all_to_all(received: Tensor, given: Tensor, *sizes: list[int], **options: Any) -> Any:
        others = sum(sizes[1]) - sizes[1][options["group"].rank()]
        sent["all_to_all"] += others * given.itemsize
        return stock_all_to_all(received, given, *sizes, **options)

    stock_all_to_all = dist.all_to_all_single
    with (
        mock.patch.object(dist, "all_reduce", ring("all_reduce", 2)),
        mock.patch.object(dist, "all_gather_into_tensor", ring("all_gather_into_tensor", 1)),
        mock.patch.object(dist, "reduce_scatter_tensor", ring("reduce_scatter_tensor", 1)),
        mock.patch.object(dist, "all_to_all_single", all_to_all),
    ):
        yield sent


def run(mesh: Mesh, *args: Any) -> list[Result]:
    """Ten steps in a world; what is sent must be what is planned."""
    results: list[Result] = world(mesh.size).run(train_shards, mesh, *args)
    for result in results:
        # An all_reduce of few bytes is not divisible by the ranks.
        assert abs(result.sent - result.planned) <= 8
    return results


def reference(
    shapes: tuple[Shape, ...],
    config: DionConfig,
    gradients_of: Callable[[tuple[Shape, ...], int], dict[str, Tensor]] = values,
) -> dict[str, ReferenceMatrix]:
    matrices = {
        name: ReferenceMatrix.start(name, weight, config)
        for shape in shapes
        for name, weight in shape.matrices(values(shapes, 0)[shape.name]).items()
    }
    for step in range(1, STEPS + 1):
        wholes = gradients_of(shapes, step)
        for shape in shapes:
            for name, gradient in shape.matrices(wholes[shape.name]).items():
                matrices[name].step(gradient, LR, WEIGHT_DECAY, config)
    return matrices


def _distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / (want.norm() + 1e-3))


def compare(
    results: list[Result],
    expected: dict[str, ReferenceMatrix],
    tolerance: float,
    states: bool = True,
) -> None:
    """Every element is on some rank, agrees, and is bitwise equal to its other copies.

    Replicas' momenta differ, and in bf16 states agree to its rounding only: `states` is then false.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    seen = {name: torch.zeros_like(matrix.weight) for name, matrix in expected.items()}
    for name, place, weight, momentum, right, columns in (b for r in results for b in r.blocks):
        want = expected[name]
        rows = slice(place.row_start, place.row_stop)
        region = (rows, slice(place.column_start, place.column_stop))
        seen[name][region] += 1
        assert _distance(weight, want.weight[region]) < tolerance, name
        assert torch.equal(copies.setdefault((name, place), weight), weight), name
        for row, values in enumerate(right, place.row_start):
            key = (name, row, columns.start, columns.stop)
            assert torch.equal(copies.setdefault(key, values), values), name
        if states:
            assert _distance(momentum, want.momentum[region]) < tolerance, name
        if states and right.numel():
            # A single column of Q is as ill-conditioned as B's smallest direction; Q P^T is not.
            assert _distance(right, want.right_factor[rows, columns]) < 100 * tolerance, name
    assert all(count.min() >= 1 for count in seen.values())
