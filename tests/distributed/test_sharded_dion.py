"""Dion on shards of any grid of ranks against the dense float64 reference. Without Megatron."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm import left_factor, orthonormalize
from megatron_dion.algorithm.reference import ReferenceMatrix
from megatron_dion.optimizer.binding import Distribution
from megatron_dion.sharding import (
    Groups,
    Part,
    Placement,
    Rank,
    Rectangle,
    Weight,
    exchange,
    reducer,
    shared_rows,
)
from megatron_dion_tools.local.world import gloo_world
from megatron_dion_tools.plan.compute import dion_operations
from megatron_dion_tools.plan.stage import DionPart
from megatron_dion_tools.plan.topology import Group
from tests.counted_operations import CountedOperations

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
ALONE = (Shape("alone", 72, 200, 0),)
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


@dataclass(frozen=True)
class World:
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
        rank: of the world.
        blocks: matrix, place, weight, momentum, right factor and which columns of it are kept.
        sent: bytes that the last step handed to collectives for other ranks.
        planned: the same as the plan says.
        state_bytes: of momenta and right factors.
        fallbacks: to Householder QR.
        charges: for each matrix the number of ranks that share its P.
        merged: matrices of whose P one rank has the triangles of all sections.
    """

    rank: int
    blocks: list[tuple[str, Rectangle, Tensor, Tensor, Tensor, slice]]
    sent: int
    planned: int
    state_bytes: int
    fallbacks: int
    charges: dict[str, int]
    merged: list[str]


class Shards:
    """What one rank has of some parameters, and an optimizer of it.

    Attributes:
        optimizer: distributed over the world.
    """

    def __init__(
        self, world: World, shapes: tuple[Shape, ...], config: DionConfig, bucket: int
    ) -> None:
        self._world = world
        self._shapes = shapes
        self._rank, self._replica, groups = world.join()
        self._placements = place(shapes, world.tp, world.dp, bucket)
        self._tensors = tensors = self._pieces(values(shapes, seed=0))
        self.optimizer = Dion(
            [{"params": list(tensors.values())}], lr=LR, weight_decay=WEIGHT_DECAY, **vars(config)
        )
        self.optimizer.distribute(
            Distribution(self._placements, tensors, torch.device("cpu"), groups)
        )

    def set_gradients(self, wholes: dict[str, Tensor], step: int) -> None:
        """Gives each piece its part of whole gradients, and replicas other ones."""
        other = differences(self._shapes, step, self._replica, self._world.replicas)
        wholes = {name: whole + other.get(name, 0) for name, whole in wholes.items()}
        for index, gradient in self._pieces(wholes).items():
            self._tensors[index].grad = gradient

    def _pieces(self, wholes: dict[str, Tensor]) -> dict[int, Tensor]:
        world = self._world
        found = {
            index: piece(
                shape, self._placements[index], wholes[shape.name], world.tp, world.dp, self._rank
            )
            for index, shape in enumerate(self._shapes)
        }
        return {index: tensor for index, tensor in found.items() if tensor is not None}


def train_shards(
    world: World,
    shapes: tuple[Shape, ...],
    config: DionConfig,
    bucket: int,
    gradients_of: Callable[[tuple[Shape, ...], int], dict[str, Tensor]] = values,
) -> Result:
    """On one rank: ten steps."""
    shards = Shards(world, shapes, config, bucket)
    optimizer = shards.optimizer
    sent = 0
    for step in range(1, STEPS + 1):
        shards.set_gradients(gradients_of(shapes, step), step)
        with counted_bytes() as counter:
            optimizer.step()
        sent = counter.bytes.total()
    [state] = [optimizer.state.values()]
    plans = [chosen.plan for chosen in optimizer.step_sets()]
    return Result(
        rank=dist.get_rank(),
        blocks=[
            (
                *(held.matrix.name, held.rectangle),
                *(held.tensors.weight, held.tensors.momentum, held.tensors.kept_right),
                held.tensors.kept_columns,
            )
            for held in optimizer.held_blocks()
        ],
        sent=sent,
        planned=optimizer.bytes_per_step(),
        state_bytes=sum(t.nbytes for tensors in state for t in tensors.values()),
        fallbacks=optimizer.fallbacks,
        charges={
            plan.matrices[k].name: len(plan.charges[k]) for plan in plans for k in plan.members
        },
        merged=[plan.matrices[k].name for plan in plans for k in plan.merged],
    )


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


@dataclass
class Sent:
    """What a rank hands to collectives.

    Attributes:
        bytes: for others, as rings send them, by collective.
        calls: number of collectives.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    calls: int = 0

    def count(self, name: str, nbytes: int) -> None:
        self.bytes[name] += nbytes
        self.calls += 1


@contextmanager
def counted_bytes() -> Iterator[Sent]:
    """Counts what this rank hands to collectives."""
    sent = Sent()

    def ring(name: str, factor: int) -> Callable[..., Any]:
        stock = getattr(dist, name)

        def counting(*args: Any, group: Any, **options: Any) -> Any:
            tensor = args[0] if name == "all_reduce" else args[1]
            share = (group.size() - 1) / (1 if name == "all_gather_into_tensor" else group.size())
            sent.count(name, int(factor * tensor.nbytes * share))
            return stock(*args, group=group, **options)

        return counting

    def all_to_all(received: Tensor, given: Tensor, *sizes: list[int], **options: Any) -> Any:
        others = sum(sizes[1]) - sizes[1][options["group"].rank()]
        sent.count("all_to_all", others * given.itemsize)
        return stock_all_to_all(received, given, *sizes, **options)

    stock_all_to_all = dist.all_to_all_single
    with (
        mock.patch.object(dist, "all_reduce", ring("all_reduce", 2)),
        mock.patch.object(dist, "all_gather_into_tensor", ring("all_gather_into_tensor", 1)),
        mock.patch.object(dist, "reduce_scatter_tensor", ring("reduce_scatter_tensor", 1)),
        mock.patch.object(dist, "all_to_all_single", all_to_all),
    ):
        yield sent


def run(world: World, *args: Any) -> list[Result]:
    """Ten steps in a world; what is sent must be what is planned."""
    results = gloo_world(world.size, train_shards, world, *args)
    for result in results:
        assert result.sent == result.planned
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
    """Every element is held by some rank, agrees, and is bitwise equal to its other copies.

    Replicas' momenta differ, and in bf16 states agree to its rounding only: `states` is then false.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    seen = {name: torch.zeros_like(matrix.weight) for name, matrix in expected.items()}
    for name, place, weight, momentum, right, columns in (b for r in results for b in r.blocks):
        want = expected[name]
        rows = slice(place.row_start, place.row_stop)
        held = (rows, slice(place.column_start, place.column_stop))
        seen[name][held] += 1
        assert _distance(weight, want.weight[held]) < tolerance, name
        assert torch.equal(copies.setdefault((name, place), weight), weight), name
        for row, values in enumerate(right, place.row_start):
            key = (name, row, columns.start, columns.stop)
            assert torch.equal(copies.setdefault(key, values), values), name
        if states:
            assert _distance(momentum, want.momentum[held]) < tolerance, name
        if states and right.numel():
            # A single column of Q is as ill-conditioned as B's smallest direction; Q P^T is not.
            assert _distance(right, want.right_factor[rows, columns]) < 100 * tolerance, name
    assert all(count.min() >= 1 for count in seen.values())


WORLDS = [World(*grid) for grid in [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 4)]]


def name_of(world: World) -> str:
    return f"tp{world.tp}-dp{world.dp}-replicas{world.replicas}"


@pytest.mark.parametrize("world", WORLDS, ids=name_of)
@pytest.mark.parametrize("shapes", [TRANSFORMER, ODD], ids=["transformer", "odd"])
def test_any_grid_equals_the_reference(world: World, shapes: tuple[Shape, ...]) -> None:
    config = DionConfig(rank_fraction=0.3, seed=7)
    compare(run(world, shapes, config, 5000), reference(shapes, config), tolerance=1e-5)


def count_operations(
    world: World, shapes: tuple[Shape, ...], config: DionConfig
) -> tuple[Counter[str], tuple[float, float]]:
    """On one rank: operations of a step, and those planned for it: products, factorizations."""
    shards = Shards(world, shapes, config, 5000)
    shards.set_gradients(values(shapes, 1), 1)
    shards.optimizer.init_state()
    with CountedOperations() as counted:
        shards.optimizer.step()
    assert not shards.optimizer.fallbacks
    planner = shards.optimizer.planner()
    here = dist.get_rank() // world.tp, dist.get_rank() % world.tp
    part = DionPart(planner, False, Group(world.dp, world.tp, 8), (1,) * len(planner.sets))
    *products, factorizations = (found[here] for found in dion_operations(part, device="cpu"))
    return counted.found, (sum(products), factorizations)


@pytest.mark.parametrize("world", [World(2, 1), World(4, 1), World(1, 4), World(2, 2)], ids=name_of)
@pytest.mark.parametrize("method", ["auto", "rcqr", "qr"])
@pytest.mark.parametrize("shapes", [TRANSFORMER, ALONE], ids=["transformer", "divided"])
def test_operations_of_each_rank_are_as_planned(
    world: World, method: str, shapes: tuple[Shape, ...]
) -> None:
    config = DionConfig(rank_fraction=0.3, seed=7, orthonormalizer=method)
    for counted, planned in gloo_world(world.size, count_operations, world, shapes, config):
        found = counted["products"], counted["factorizations"]
        assert found == pytest.approx(planned, rel=1e-12)


@pytest.mark.parametrize("fraction", [0.01, 1.0])
@pytest.mark.parametrize("method", ["rcqr", "cqr", "qr"])
@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
def test_options_equal_the_reference(fraction: float, method: str, right_factor: str) -> None:
    config = DionConfig(
        rank_fraction=fraction,
        orthonormalizer=method,
        right_factor=right_factor,
        scale_mode="dion",
        momentum=0.8,
    )
    shapes = (*TRANSFORMER[1:], *ODD)
    compare(run(World(2, 2), shapes, config, 10**9), reference(shapes, config), tolerance=2e-5)


@pytest.mark.parametrize("method", ["rcqr", "cqr"])
@pytest.mark.parametrize("world", [World(4, 1), World(2, 2), World(1, 4)], ids=name_of)
@pytest.mark.parametrize(("dim", "fraction"), [(0, 0.1), (None, 0.1), (1, 1.0)])
def test_one_matrix_is_divided_over_a_group(
    world: World, dim: int | None, fraction: float, method: str
) -> None:
    shapes = (Shape("alone", 72, 200, dim),)
    config = DionConfig(rank_fraction=fraction, orthonormalizer=method)
    results = run(world, shapes, config, 10**9)
    assert results[0].charges == {"alone": world.tp if world.tp > 1 else world.dp}
    assert not results[0].merged
    compare(results, reference(shapes, config), tolerance=1e-5)


@pytest.mark.parametrize("method", ["rcqr", "cqr", "qr"])
@pytest.mark.parametrize(
    "world", [World(2, 1), World(4, 1), World(2, 2), World(2, 1, 2)], ids=name_of
)
@pytest.mark.parametrize("columns", [200, 48])  # sections of more rows than r, and of fewer
def test_triangles_of_row_parallel_weights(world: World, columns: int, method: str) -> None:
    shapes = (Shape("row", 72, columns, 1), Shape("other", 160, 160, 0))
    config = DionConfig(rank_fraction=0.4, orthonormalizer=method)
    results = run(world, shapes, config, 10**9)
    assert results[0].merged == ["row"]
    assert results[0].charges["row"] == world.tp
    states = world.replicas == 1
    compare(results, reference(shapes, config), tolerance=1e-5, states=states)


@pytest.mark.parametrize("method", ["rcqr", "qr"])
@pytest.mark.parametrize(
    ("world", "count"), [(World(1, 1), 4), (World(4, 1), 4), (World(1, 4), 3)]
)  # whole, by triangles, and by sums
def test_more_than_fits_a_cache_is_orthonormalized_in_batches(
    world: World, count: int, method: str
) -> None:
    shapes = tuple(Shape(f"{i}", 96, 64, 1) for i in range(count))
    config = DionConfig(rank_fraction=0.3, seed=7, orthonormalizer=method)
    with mock.patch.object(left_factor, "_CACHE_BYTES", 1):
        results = run(world, shapes, config, 5000)
    compare(results, reference(shapes, config), tolerance=1e-5)


def rank_one(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    """The same direction in all steps, so that B has rank one."""
    return {name: (v[:, :1] @ v[:1]) * (1 + 1 / step) for name, v in values(shapes, 1).items()}


def nothing(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    return {name: torch.zeros_like(v) for name, v in values(shapes, 1).items()}


@pytest.mark.parametrize("shapes", [TRANSFORMER, ALONE], ids=["many", "divided"])
@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
def test_no_gradient_is_no_step(shapes: tuple[Shape, ...], right_factor: str) -> None:
    """P is zero, so that every Cholesky factorization fails."""
    config = DionConfig(rank_fraction=0.2, right_factor=right_factor, orthonormalizer="rcqr")
    results = gloo_world(4, train_shards, World(2, 2), shapes, config, 10**9, nothing)
    # Each section falls back, and the stack of triangles too where there is one.
    charges, merged = results[0].charges, results[0].merged
    assert sum(result.fallbacks for result in results) == STEPS * (
        sum(charges.values()) + len(merged)
    )
    compare(results, reference(shapes, config, nothing), tolerance=1e-6)


def one_is_zero(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    return {k: v * (k != shapes[0].name) for k, v in values(shapes, step).items()}


def test_fallback_of_one_set_keeps_the_order_of_all_calls() -> None:
    """Only one tensor-parallel group has it; the other set's calls are between all groups."""
    shapes = (Shape("zero", 72, 200, 0), Shape("full", 72, 200, 0))
    config = DionConfig(rank_fraction=0.2, orthonormalizer="rcqr")
    results = gloo_world(4, train_shards, World(2, 2), shapes, config, 1, one_is_zero)
    assert sorted(result.fallbacks for result in results) == [0, 0, STEPS, STEPS]
    assert results[0].charges == {"zero": 2, "full": 2}
    compare(results, reference(shapes, config, one_is_zero), tolerance=1e-5)


def train_with_another_verdict(*args: Any) -> Any:
    """The first rank alone finds fault with every P."""
    module = sys.modules[orthonormalize.__module__]
    growth = 0.0 if dist.get_rank() == 0 else 50.0
    with mock.patch.object(module, "_GROWTH", growth):
        return train_shards(*args)


@pytest.mark.parametrize("world", [World(2, 1), World(2, 2), World(4, 1), World(1, 4)], ids=name_of)
def test_one_rank_that_finds_fault_is_enough(world: World) -> None:
    shapes, config = (*TRANSFORMER, *ALONE), DionConfig(rank_fraction=0.3, seed=7)
    results = gloo_world(world.size, train_with_another_verdict, world, shapes, config, 5000)
    assert any(count > 1 for count in results[0].charges.values())
    compare(results, reference(shapes, config), tolerance=1e-5)


def every_second(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    """Gradients of rank one, nearly, of every second matrix: far from orthogonal columns of P."""
    return {
        name: v + (30 * v[:, :1] @ v[:1] if i % 2 else 0)
        for i, (name, v) in enumerate(values(shapes, step).items())
    }


@pytest.mark.parametrize("world", [World(2, 1), World(2, 2), World(4, 1), World(1, 4)], ids=name_of)
@pytest.mark.parametrize("growth", [0.0, 50.0])
def test_what_one_cholesky_qr_leaves_is_done_by_triangles(
    monkeypatch: pytest.MonkeyPatch, world: World, growth: float
) -> None:
    """All of it, or what is ill-conditioned; it is the same run, and no fallback."""
    monkeypatch.setattr(sys.modules[orthonormalize.__module__], "_GROWTH", growth)
    shapes = (*TRANSFORMER, *ALONE)
    config = DionConfig(rank_fraction=0.3, seed=7)
    results = gloo_world(world.size, train_shards, world, shapes, config, 5000, every_second)
    assert any(count > 1 for count in results[0].charges.values())
    assert not any(result.fallbacks for result in results)
    compare(results, reference(shapes, config, every_second), tolerance=1e-4, states=False)


@pytest.mark.parametrize("shapes", [TRANSFORMER, ALONE], ids=["many", "divided"])
@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
def test_deficient_gradients_are_bounded(shapes: tuple[Shape, ...], right_factor: str) -> None:
    """Only `orth` does not turn the rounding in directions that B does not have into updates."""
    config = DionConfig(rank_fraction=0.2, right_factor=right_factor)
    results = gloo_world(4, train_shards, World(2, 2), shapes, config, 10**9, rank_one)
    expected = reference(shapes, config, rank_one)
    if right_factor == "orth":
        # float32 leaves about a tenth of `DAMPING` in the other directions.
        compare(results, expected, tolerance=1e-3, states=False)
    for name, _, weight, momentum, right, _ in (b for r in results for b in r.blocks):
        step = (
            LR * config.scale(*expected[name].weight.shape) * expected[name].right_factor.shape[1]
        )
        assert weight.abs().max() < 5 + STEPS * step
        assert momentum.isfinite().all()
        assert right.isfinite().all()


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_sizes_of_gradients_do_not_matter(size: float) -> None:
    """Nothing overflows; what is lost in eps stands still."""

    def gradients_of(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
        return {name: size * v for name, v in values(shapes, step).items()}

    config = DionConfig(rank_fraction=0.3)
    shapes = TRANSFORMER
    results = gloo_world(4, train_shards, World(2, 2), shapes, config, 5000, gradients_of)
    expected = reference(shapes, config, gradients_of)
    compare(results, expected, tolerance=1e-5, states=False)


@pytest.mark.parametrize("fusion", ["qkv", "heads"])
@pytest.mark.parametrize(("tp", "dp"), [(3, 1), (2, 2)])
def test_query_groups_on_any_number_of_tensor_ranks(fusion: str, tp: int, dp: int) -> None:
    shapes = (Shape("qkv", 48, 36, 0, fusion),)
    config = DionConfig(rank_fraction=0.5)
    results = run(World(tp, dp), shapes, config, 10**9)
    compare(results, reference(shapes, config), tolerance=1e-5)


@pytest.mark.parametrize("world", [World(1, 1, 2), World(2, 2, 2), World(1, 2, 3)], ids=name_of)
@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_replicas_with_other_gradients_follow_their_mean(world: World, fraction: float) -> None:
    """At the larger fraction compression pays for some of the weights only."""
    shapes = TRANSFORMER
    config = DionConfig(rank_fraction=fraction)
    results = run(world, shapes, config, 5000)
    compare(results, reference(shapes, config), tolerance=1e-5, states=False)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ({"comm_dtype": "bf16"}, 2e-3),
        ({"factor_dtype": "bf16"}, 2e-3),
        ({"momentum_dtype": "bf16"}, 2e-3),
        ({"comm_dtype": "bf16", "factor_dtype": "bf16", "momentum_dtype": "bf16"}, 4e-3),
    ],
)
@pytest.mark.parametrize("world", [World(1, 1), World(2, 2), World(2, 1, 2)], ids=name_of)
def test_half_precision_of_states_and_exchange(
    world: World, dtypes: dict[str, str], tolerance: float
) -> None:
    config = DionConfig(rank_fraction=0.3, **dtypes)
    results = run(world, TRANSFORMER, config, 5000)
    compare(results, reference(TRANSFORMER, config), tolerance, states=False)


@pytest.mark.parametrize("world", [World(2, 1), World(1, 2), World(2, 2)], ids=name_of)
def test_products_with_bf16_operands(world: World) -> None:
    """Copies of elements and of rows of Q are bitwise equal all the same."""
    config = DionConfig(rank_fraction=0.3, fp32_matmul_prec="medium")
    results = run(world, TRANSFORMER, config, 5000)
    compare(results, reference(TRANSFORMER, config), tolerance=8e-3, states=False)


def test_state_is_as_large_as_the_design_says() -> None:
    """(m n + m r) / (TP DP) numbers a rank, nothing twice, where no row is cut."""
    shapes = (Shape("column", 32, 64, 0), Shape("row", 64, 32, 1))
    config = DionConfig(rank_fraction=0.25)
    for world in (World(1, 1), World(2, 1), World(2, 2), World(4, 2)):
        numbers = sum(s.rows * (s.columns + 8) for s in shapes)
        results = run(world, shapes, config, 10**9)
        assert sum(result.state_bytes for result in results) == 4 * numbers
        for shape in shapes:  # alone, it is cut into equal pieces
            numbers = shape.rows * (shape.columns + 8)
            for result in run(world, (shape,), config, 10**9):
                assert result.state_bytes == 4 * numbers / world.size


def test_comparison_notices_another_momentum() -> None:
    config = DionConfig(rank_fraction=0.3)
    results = run(World(1, 2), TRANSFORMER, config, 5000)
    with pytest.raises(AssertionError):
        compare(results, reference(TRANSFORMER, replace(config, momentum=0.9)), tolerance=1e-5)


def lose_tiles(self: Any) -> Any:
    """The sums of a hop without what arrives from the last peer."""
    if not hasattr(self, "_arrivals"):
        return
    kept, self._arrivals = self._arrivals, self._arrivals[:-1]
    yield from _UNBROKEN_SUM(self)
    self._arrivals = kept


def double_tiles(self: Any) -> Any:
    """What arrives from the last peer is counted twice: twice the whole would be the same P."""
    yield from _UNBROKEN_SUM(self)
    if hasattr(self, "_arrivals"):
        for arrived, targets in self._arrivals[-1:]:
            if arrived:
                torch._foreach_add_(targets, arrived)


def nothing_happens(self: Any, *args: Any) -> Any:
    """A generator that does not communicate."""
    yield


_UNBROKEN_SUM = reducer.HopBuffers.sum
BREAKAGES = {
    "lost tiles of P": (reducer.HopBuffers, "sum", lose_tiles),
    "tiles of P counted twice": (reducer.HopBuffers, "sum", double_tiles),
    "P not brought back": (reducer.HopBuffers, "spread", nothing_happens),
    "sums of parts not made": (exchange.ShardedExchange, "sum_parts", nothing_happens),
    "triangles not joined": (left_factor, "_join", lambda *_: 0),
    "rows of R not summed": (exchange.ShardedExchange, "sum_rows", nothing_happens),
    "local norms": (exchange.ShardedExchange, "sum_right", nothing_happens),
    "columns of Q not gathered": (shared_rows.GatheredColumns, "gather", nothing_happens),
    "P of replicas not averaged": (exchange.ShardedExchange, "_average_sections", nothing_happens),
    "R of replicas not averaged": (exchange.ShardedExchange, "_average_rows", nothing_happens),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_exchange_is_noticed(monkeypatch: pytest.MonkeyPatch, breakage: str) -> None:
    owner, name, broken = BREAKAGES[breakage]
    monkeypatch.setattr(owner, name, broken)
    # Sections have sums, unless that is no way.
    method = "qr" if "triangles" in breakage else "auto"
    config = DionConfig(rank_fraction=0.3, orthonormalizer=method)
    world = World(2, 1, 2) if "replicas" in breakage else World(2, 2)
    results = gloo_world(world.size, train_shards, world, TRANSFORMER, config, 5000)
    with pytest.raises(AssertionError):
        compare(results, reference(TRANSFORMER, config), tolerance=1e-5, states=False)
