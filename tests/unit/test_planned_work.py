"""Planned operations are those that steps make."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm import PRECISIONS
from megatron_dion.algorithm.orthonormalize import (
    ONCE,
    factor,
    orthonormalize,
    orthonormalize_part,
    summed_rows,
)
from megatron_dion.algorithm.products import products_in
from megatron_dion.sharding import Grid, Placement, Planner, Weight
from megatron_dion_tools.plan.compute import (
    dion_operations,
    newton_schulz,
    optimizer_work,
    orthonormalization,
)
from megatron_dion_tools.plan.memory import memory
from megatron_dion_tools.plan.models import GptShape
from megatron_dion_tools.plan.rounding import copied_bytes
from megatron_dion_tools.plan.stage import DionPart, Optimizer, Run, Stage
from megatron_dion_tools.plan.topology import Group, Topology
from tests.counted_operations import CountedOperations

SHAPES = ((40, 24), (24, 40), (16, 16))


def whole(config: DionConfig, shapes: Sequence[tuple[int, int]] = SHAPES) -> DionPart:
    placements = [
        Placement(Weight(str(i), m, n), start=0, bucket_numel=m * n)
        for i, (m, n) in enumerate(shapes)
    ]
    planner = Planner(placements, Grid(), config)
    return DionPart(planner, False, Group(1, 1, 8), (1,))


@pytest.mark.parametrize("fraction", [1 / 16, 1 / 4, 1.0])
@pytest.mark.parametrize("method", ["auto", "rcqr", "cqr", "qr"])
@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
def test_a_step_of_whole_matrices(fraction: float, method: str, right_factor: str) -> None:
    config = DionConfig(rank_fraction=fraction, orthonormalizer=method, right_factor=right_factor)
    torch.manual_seed(0)  # `cqr` breaks down on a few square matrices
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Dion(parameters, lr=0.01, **vars(config))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.init_state()
    with CountedOperations() as counted:
        optimizer.step()
    assert optimizer.fallbacks == 0
    products, float32_products, factorizations = dion_operations(whole(config), device="cpu")
    ranks = [config.rank(*shape) for shape in SHAPES]
    assert products.sum() == sum(8 * m * n * r for (m, n), r in zip(SHAPES, ranks, strict=True))
    assert counted.found["products"] == products.sum() + float32_products.sum()
    assert counted.found["factorizations"] == pytest.approx(factorizations.sum(), rel=1e-12)
    assert counted.found["factorizations"] > 0


@pytest.mark.parametrize("method", [ONCE, "rcqr", "cqr"])
@pytest.mark.parametrize("rank", [8, 33, 70])
def test_a_part_of_a_divided_matrix(method: str, rank: int) -> None:
    config, rows = DionConfig(), 200
    part = torch.randn(3, rows, rank)
    with CountedOperations() as counted:
        sums = orthonormalize_part(part, method, lambda k: torch.randn(1, k, rows), 1.25)
        values = next(sums)
        for _ in range(len(summed_rows(method, rank, 1.25)) - 1):
            values = sums.send(values)
        with pytest.raises(StopIteration):
            sums.send(values)
    each = orthonormalization(
        config, torch.tensor([rows] * 3).double().numpy(), rank, method, "cpu"
    )
    assert counted.found["products"] == each[0].sum()
    assert counted.found["factorizations"] == pytest.approx(each[1].sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "size", "fraction"),
    [
        *((method, 2, 1 / 4) for method in ("rcqr", "cqr", "qr")),
        *((method, 4, 1 / 2) for method in ("auto", "rcqr", "cqr", "qr")),
        ("auto", 4, 1),
    ],
)
def test_triangles_of_a_row_parallel_matrix(method: str, size: int, fraction: float) -> None:
    """Sections of more rows than r, and of fewer."""
    config, columns = DionConfig(orthonormalizer=method, rank_fraction=fraction), 40
    weights = [Weight("row", 24, columns // size, 1, size), Weight("other", 60, 120, 0, size)]
    placements = [Placement(w, 0, w.rows * w.columns) for w in weights]
    planner = Planner(placements, Grid(size, 1), config)
    assert list(planner.owners) == [0]
    both = DionPart(planner, False, Group(1, size, 8), (1,))
    other = DionPart(Planner(placements[1:], Grid(size, 1), config), False, Group(1, size, 8), (1,))
    products, float32_products, factorizations = (
        a.sum() - b.sum()
        for a, b in zip(dion_operations(both, "cpu"), dion_operations(other, "cpu"), strict=True)
    )
    rank = planner.layout.matrices[0].rank
    torch.manual_seed(0)
    sections = torch.randn(1, columns, rank).chunk(size, dim=1)

    def sketch(rows: int) -> Callable[[int], Tensor]:
        return lambda k: torch.randn(1, k, rows)

    with CountedOperations() as counted:
        found = [factor(p, method, sketch(columns // size), 1.25) for p in sections]
        stack = torch.cat([triangle for _, triangle, _ in found], dim=1)
        joined, _ = orthonormalize(stack, method, sketch(stack.shape[1]), 1.25)
        for (base, _, _), part in zip(found, joined.chunk(size, dim=1), strict=True):
            base @ part
    assert products == 8 * 24 * columns * rank
    assert counted.found["products"] == float32_products
    assert counted.found["factorizations"] == pytest.approx(factorizations, rel=1e-12)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muons_iterations(shape: tuple[int, int]) -> None:
    muon = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    with CountedOperations() as counted:
        muon.newton_schulz(torch.randn(shape), steps=5)
    assert counted.found["products"] == newton_schulz(*shape, 5)


class Allocated(TorchDispatchMode):
    """The most bytes at a time of tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[list[weakref.ref[Tensor]], int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._made = {k: v for k, v in self._made.items() if any(ref() is not None for ref in v[0])}
        storage = result.untyped_storage()
        if storage._cdata in self._made:
            self._made[storage._cdata][0].append(weakref.ref(result))
        elif storage._cdata not in given:
            self._made[storage._cdata] = [weakref.ref(result)], storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._made.values()))
        return result


@pytest.mark.parametrize("stack", [(1, 5, 70), (3, 40, 6)])
@pytest.mark.parametrize("rank", [2, 5])
def test_copies_of_products_in_bf16(stack: tuple[int, int, int], rank: int) -> None:
    """Of a block of few rows, and of one of many, where the rounded factor is what counts."""
    count, rows, columns = stack
    total, right, left = (torch.randn(s) for s in (stack, (count, rows, rank), (columns, rank)))
    with products_in("medium") as products:
        peaks = []
        for multiply in (
            lambda: products.add_left(left, total, right),
            lambda: products.set_right(right, total, left),
            lambda: products.add_outer(total, right, left, beta=1, alpha=2),
        ):
            with Allocated() as allocated:
                multiply()
            peaks.append(allocated.peak)
    assert max(peaks) == copied_bytes(
        np.array(total.numel()), np.array(count * rows), columns, rank
    )


def test_only_medium_copies_and_passes_more() -> None:
    shape = GptShape(2, 64, 128, 4, 4)
    run = Run(shape, Topology(tp=2, dp=2), Optimizer("dion"))
    stages = {
        precision: Stage(
            replace(run, optimizer=Optimizer("dion", DionConfig(fp32_matmul_prec=precision))), 0
        )
        for precision in PRECISIONS
    }
    kept = {precision: memory(stage)["bf16 copies"] for precision, stage in stages.items()}
    assert not kept["highest"].any()
    assert not kept["high"].any()
    assert kept["medium"].shape == (2, 2)
    assert (kept["medium"] > 0).all()
    largest = 64 * 64, 64, 64, 16  # a tensor rank's gate, up, query, or half of the last weight
    assert kept["medium"].max() == copied_bytes(*map(np.array, largest[:2]), *largest[2:])
    passes = {precision: optimizer_work(stage).passes for precision, stage in stages.items()}
    assert (passes["high"] == passes["highest"]).all()
    assert (passes["medium"] > passes["high"]).all()
