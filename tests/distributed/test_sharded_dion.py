"""Dion on shards of any grid of ranks against the dense float64 reference. Without Megatron."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_dion import DionConfig
from megatron_dion.algorithm import orthonormalize, step
from megatron_dion.sharding import exchange, left_factor, norms, right_factor
from megatron_dion.sharding.matrices import compression_pays
from tests.distributed.sharded import (
    ODD,
    STEPS,
    TRANSFORMER,
    Mesh,
    Shape,
    compare,
    reference,
    run,
    train_shards,
    values,
)
from tests.worlds import world

ALONE = (Shape("alone", 72, 200, 0),)
RESIDUALS = pytest.mark.parametrize("residual", ["none", "rows"])
GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 4)]


def name_of(mesh: Mesh) -> str:
    return f"tp{mesh.tp}-dp{mesh.dp}-replicas{mesh.replicas}"


@pytest.mark.parametrize("mesh", [Mesh(*sizes) for sizes in GRIDS], ids=name_of)
@pytest.mark.parametrize("shapes", [TRANSFORMER, ODD], ids=["transformer", "odd"])
@RESIDUALS
def test_any_grid_equals_the_reference(
    mesh: Mesh, shapes: tuple[Shape, ...], residual: Any
) -> None:
    config = DionConfig(rank_fraction=0.3, seed=7, residual=residual)
    expected = reference(shapes, config)
    results = run(mesh, shapes, config, 5000)
    compare(results, expected, tolerance=1e-5)
    measured = {d.name: d for result in results for d in result.diagnostics}
    assert measured.keys() == expected.keys()
    for name, matrix in expected.items():
        assert measured[name].momentum_norm == pytest.approx(float(matrix.momentum.norm()), 1e-5)


@pytest.mark.parametrize("fraction", [0.01, 1.0])
@RESIDUALS
def test_options_equal_the_reference(fraction: float, residual: Any) -> None:
    config = DionConfig(rank_fraction=fraction, scale_mode="dion", momentum=0.8, residual=residual)
    shapes = (*TRANSFORMER[1:], *ODD)
    compare(run(Mesh(2, 2), shapes, config, 10**9), reference(shapes, config), tolerance=2e-5)


@pytest.mark.parametrize("mesh", [Mesh(4, 1), Mesh(2, 2), Mesh(1, 4)], ids=name_of)
@pytest.mark.parametrize(("dim", "fraction"), [(0, 0.1), (None, 0.1), (1, 1.0)])
def test_more_columns_of_p_than_rows_on_a_rank(
    mesh: Mesh, dim: int | None, fraction: float
) -> None:
    shapes = (Shape("alone", 72, 200, dim), Shape("narrow", 160, 12, dim))
    config = DionConfig(rank_fraction=fraction)
    compare(run(mesh, shapes, config, 10**9), reference(shapes, config), tolerance=1e-5)


def train_as_on_a_gpu(*args: Any) -> Any:
    with (
        mock.patch.object(step, "is_cpu", return_value=False),
        mock.patch.object(orthonormalize, "is_cpu", return_value=False),
        mock.patch.object(orthonormalize, "GRAM_NUMBERS", 250),  # several calls of a few matrices
    ):
        return train_shards(*args)


@pytest.mark.parametrize("mesh", [Mesh(2, 2), Mesh(1, 3)], ids=name_of)
@RESIDUALS
def test_the_calls_of_a_gpu_equal_the_reference(mesh: Mesh, residual: Any) -> None:
    config = DionConfig(rank_fraction=0.3, residual=residual)
    results = world(mesh.size).run(train_as_on_a_gpu, mesh, TRANSFORMER, config, 5000)
    compare(results, reference(TRANSFORMER, config), tolerance=1e-5)


def rank_one(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    """The same direction in all steps, so that B has rank one."""
    return {name: (v[:, :1] @ v[:1]) * (1 + 1 / step) for name, v in values(shapes, 1).items()}


def rank_three(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    """Three directions in the first half of the steps, and all in the second."""
    low = {name: v[:, :3] @ v[:3] for name, v in values(shapes, 1).items()}
    return low if step <= STEPS // 2 else values(shapes, step)


def nothing(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    return {name: torch.zeros_like(v) for name, v in values(shapes, 1).items()}


def one_is_zero(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    return {k: v * (k != shapes[0].name) for k, v in values(shapes, step).items()}


@pytest.mark.parametrize("mesh", [Mesh(1, 1), Mesh(4, 1), Mesh(2, 2)], ids=name_of)
@pytest.mark.parametrize("shapes", [TRANSFORMER, ALONE], ids=["many", "one"])
@pytest.mark.parametrize("gradients_of", [rank_one, rank_three, nothing, one_is_zero])
@RESIDUALS
def test_dependent_columns_of_p(
    mesh: Mesh, shapes: tuple[Shape, ...], gradients_of: Any, residual: Any
) -> None:
    """Directions that B does not have get no update, and rounding no residual, on any grid."""
    config = DionConfig(rank_fraction=0.2, residual=residual)
    results = run(mesh, shapes, config, 10**9, gradients_of)
    compare(results, reference(shapes, config, gradients_of), tolerance=5e-5, states=False)


@pytest.mark.parametrize("size", [1e30, 1e-30])
@RESIDUALS
def test_sizes_of_gradients_do_not_matter(size: float, residual: Any) -> None:
    """Nothing overflows; what is lost in eps stands still."""
    config = DionConfig(rank_fraction=0.3, residual=residual)
    gradients_of = large if size > 1 else small
    results = run(Mesh(2, 2), TRANSFORMER, config, 5000, gradients_of)
    expected = reference(TRANSFORMER, config, gradients_of)
    compare(results, expected, tolerance=1e-5, states=False)


def large(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    return {name: 1e30 * v for name, v in values(shapes, step).items()}


def small(shapes: tuple[Shape, ...], step: int) -> dict[str, Tensor]:
    return {name: 1e-30 * v for name, v in values(shapes, step).items()}


@pytest.mark.parametrize("fusion", ["qkv", "heads"])
@pytest.mark.parametrize(("tp", "dp"), [(3, 1), (2, 2)])
def test_query_groups_on_any_number_of_tensor_ranks(fusion: str, tp: int, dp: int) -> None:
    shapes = (Shape("qkv", 48, 36, 0, fusion),)
    config = DionConfig(rank_fraction=0.5)
    compare(run(Mesh(tp, dp), shapes, config, 10**9), reference(shapes, config), tolerance=1e-5)


@pytest.mark.parametrize("mesh", [Mesh(1, 1, 2), Mesh(2, 2, 2), Mesh(1, 2, 3)], ids=name_of)
@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_replicas_with_other_gradients_follow_their_mean(mesh: Mesh, fraction: float) -> None:
    """At the larger fraction compression pays for some of the weights only.

    Those do not move along the residual, which differs between replicas.
    """
    config = DionConfig(rank_fraction=fraction)
    results = run(mesh, TRANSFORMER, config, 5000)
    expected = reference(TRANSFORMER, config)
    without = reference(TRANSFORMER, replace(config, residual="none"))
    for shape in TRANSFORMER:
        if compression_pays(shape.weight(1).matrices(config)):
            names = shape.matrices(torch.empty(shape.rows, shape.columns))
            expected |= {name: without[name] for name in names}
    compare(results, expected, tolerance=1e-5, states=False)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ({"comm_dtype": "bf16"}, 2e-3),
        ({"factor_dtype": "bf16"}, 2e-3),
        ({"momentum_dtype": "bf16"}, 2e-3),
        ({"comm_dtype": "bf16", "factor_dtype": "bf16", "momentum_dtype": "bf16"}, 4e-3),
    ],
)
@pytest.mark.parametrize("mesh", [Mesh(1, 1), Mesh(2, 2), Mesh(2, 1, 2)], ids=name_of)
@RESIDUALS
def test_half_precision_of_states_and_exchange(
    mesh: Mesh, dtypes: dict[str, str], tolerance: float, residual: Any
) -> None:
    config = DionConfig(rank_fraction=0.3, residual=residual, **dtypes)
    results = run(mesh, TRANSFORMER, config, 5000)
    alike = config if mesh.replicas == 1 else replace(config, residual="none")
    compare(results, reference(TRANSFORMER, alike), tolerance, states=False)


def test_more_sets_need_less_memory_and_change_nothing() -> None:
    most = []
    for count in (1, 2, 5):
        config = DionConfig(rank_fraction=0.3, exchange_sets=count)
        results = run(Mesh(2, 2), TRANSFORMER, config, 5000)
        compare(results, reference(TRANSFORMER, config), tolerance=1e-5)
        most.append(max(result.buffer_bytes for result in results))
    assert most[2] < 0.85 * most[1]
    assert most[1] <= most[0]


def test_state_is_as_large_as_the_design_says() -> None:
    """(m n + m r) / (TP DP) numbers a rank, nothing twice, where no row is cut."""
    shapes = (Shape("column", 32, 64, 0), Shape("row", 64, 32, 1))
    config = DionConfig(rank_fraction=0.25)
    for mesh in (Mesh(1, 1), Mesh(2, 1), Mesh(2, 2)):
        numbers = sum(s.rows * (s.columns + 8) for s in shapes)
        results = run(mesh, shapes, config, 10**9)
        assert sum(result.state_bytes for result in results) == 4 * numbers


def test_comparison_notices_another_momentum() -> None:
    config = DionConfig(rank_fraction=0.3)
    results = run(Mesh(1, 2), TRANSFORMER, config, 5000)
    with pytest.raises(AssertionError):
        compare(results, reference(TRANSFORMER, replace(config, momentum=0.9)), tolerance=1e-5)


def lose_tiles(self: Any) -> Any:
    """The sums of a hop without what arrives from the last peer."""
    arrivals, targets = self._arrivals, self._targets
    self._arrivals, self._targets = arrivals[:-1], targets[:-1]
    yield from _UNBROKEN_SUM(self)
    self._arrivals, self._targets = arrivals, targets


def double_tiles(self: Any) -> Any:
    """What arrives from the last peer is counted twice: twice the whole would be the same P."""
    yield from _UNBROKEN_SUM(self)
    if self._targets[-1]:
        torch._foreach_add_(self._targets[-1], self._arrivals[-1])


def only_matrices(self: Any) -> Any:
    """Sums the squares of columns over the whole world, and leaves the rows as they are."""
    for squares in self.columns.values():
        dist.all_reduce(squares, group=dist.group.WORLD)
    yield


def nothing_happens(self: Any, *args: Any) -> Any:
    """A generator that does not communicate."""
    yield


def reduce_only(operation: Any) -> Any:
    """Combines rows by this operation, and not by others."""

    def reduce_rows(self: Any, tensor: Tensor, other: Any) -> None:
        if other == operation:
            _UNBROKEN_REDUCTION(self, tensor, other)

    return reduce_rows


_HOP, _EXCHANGE = left_factor._HopExchange, exchange.ShardedExchange
_UNBROKEN_SUM, _UNBROKEN_REDUCTION = _HOP.sum, _EXCHANGE.reduce_rows
BREAKAGES: dict[str, tuple[Any, str, Any]] = {
    "lost tiles of P": (_HOP, "sum", lose_tiles),
    "tiles of P counted twice": (_HOP, "sum", double_tiles),
    "P not brought back": (_HOP, "spread", nothing_happens),
    "Gram matrices not summed": (_EXCHANGE, "reduce_rows", reduce_only(ReduceOp.MAX)),
    "largest entries not compared": (_EXCHANGE, "reduce_rows", reduce_only(ReduceOp.SUM)),
    "rows of R not summed": (right_factor.RightFactorExchange, "sum", nothing_happens),
    "cut rows of R not summed": (right_factor._CutRows, "sum", nothing_happens),
    "local norms": (norms.NormExchange, "sum", nothing_happens),
    "local rows of B": (norms.NormExchange, "sum", only_matrices),
    "columns of Q not gathered": (right_factor._StoredColumns, "gather", nothing_happens),
    "P of replicas not averaged": (left_factor, "all_reduce", nothing_happens),
    "R of replicas not averaged": (right_factor.RightFactorExchange, "_average", nothing_happens),
}


def train_broken(breakage: str, *args: Any) -> Any:
    with mock.patch.object(*BREAKAGES[breakage]):
        return train_shards(*args)


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_exchange_is_noticed(breakage: str) -> None:
    config = DionConfig(rank_fraction=0.3, residual="none" if "replicas" in breakage else "rows")
    mesh = Mesh(2, 1, 2) if "replicas" in breakage else Mesh(2, 2)
    results = world(4).run(train_broken, breakage, mesh, TRANSFORMER, config, 5000)
    with pytest.raises(AssertionError):
        compare(results, reference(TRANSFORMER, config), tolerance=1e-5, states=False)
