"""Diagnostics of the plain optimizer against dense float64; their records; nothing when off."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dion import Dion
from megatron_dion.algorithm.reference import ReferenceMatrix
from megatron_dion.optimizer.diagnostics import (
    MatrixDiagnostics,
    Snapshot,
    Spread,
    by_kind,
    read_diagnostics,
    to_record,
)
from tests.dense_diagnostics import step_and_measure

LR, WEIGHT_DECAY = 0.03, 0.1
SHAPES = {"tall": (40, 12), "wide": (12, 40), "square": (16, 16), "row": (1, 9), "column": (9, 1)}


def draw(shape: tuple[int, int], seed: int) -> Tensor:
    """A matrix whose singular values fall, as those of gradients do."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(0, -1.5, shape[1])


def optimizer_of(weights: dict[str, Parameter], **options: Any) -> Dion:
    return Dion(weights.items(), lr=LR, weight_decay=WEIGHT_DECAY, **options)


def weights_of(shapes: dict[str, tuple[int, int]]) -> dict[str, Parameter]:
    return {name: Parameter(draw(shape, i)) for i, (name, shape) in enumerate(shapes.items())}


def set_gradients(weights: dict[str, Parameter], step: int, factor: float = 1.0) -> None:
    for i, weight in enumerate(weights.values()):
        weight.grad = factor * draw(tuple(weight.shape), 100 * step + i)


@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("factor", [1.0, 1e30])
def test_equal_the_dense_ones(right_factor: str, fraction: float, factor: float) -> None:
    weights = weights_of(SHAPES)
    optimizer = optimizer_of(weights, right_factor=right_factor, rank_fraction=fraction)
    references = {k: ReferenceMatrix.start(k, w, optimizer.config) for k, w in weights.items()}
    for step in range(1, 4):
        set_gradients(weights, step, factor)
        expected = {
            name: step_and_measure(
                references[name], weight.grad.clone(), LR, WEIGHT_DECAY, optimizer.config
            )
            for name, weight in weights.items()
            if weight.grad is not None
        }
        optimizer.diagnose_next_step()
        optimizer.step()
        found = {matrix.name: matrix for matrix in optimizer.take_diagnostics()}
        assert found.keys() == weights.keys()
        for name, matrix in found.items():
            assert (matrix.rows, matrix.columns) == SHAPES[name]
            assert matrix.rank == optimizer.config.rank(*SHAPES[name])
            assert matrix.orthonormality_error is not None
            assert matrix.orthonormality_error < 3e-5
            assert matrix.owner_seconds
            expected[name].check(matrix, tolerance=1e-3)


def test_states_in_bf16_cost_a_rounding() -> None:
    weights = weights_of({"tall": (40, 12)})
    dtypes = dict.fromkeys(("momentum_dtype", "factor_dtype", "comm_dtype"), "bf16")
    optimizer = optimizer_of(weights, **dtypes)
    reference = ReferenceMatrix.start("tall", weights["tall"], optimizer.config)
    set_gradients(weights, 1)
    gradient = draw((40, 12), 100)
    expected = step_and_measure(reference, gradient, LR, WEIGHT_DECAY, optimizer.config)
    optimizer.diagnose_next_step()
    optimizer.step()
    [found] = optimizer.take_diagnostics()
    expected.check(found, tolerance=0.02)
    assert found.orthonormality_error is not None
    assert 1e-4 < found.orthonormality_error < 0.05  # of P as it is used, in bf16


def test_zero_total_has_no_shares() -> None:
    weights = {"zero": Parameter(torch.ones(6, 4))}
    weights["zero"].grad = torch.zeros(6, 4)
    optimizer = optimizer_of(weights, rank_fraction=0.5)
    optimizer.diagnose_next_step()
    optimizer.step()
    [found] = optimizer.take_diagnostics()
    assert found.captured is None
    assert found.stable_rank is None
    assert found.energy_ranks == (None,) * 5
    assert found.update_rms == found.update_norm == found.momentum_norm == 0
    record = to_record(Snapshot(1, (found,)))
    assert read_diagnostics([record])[0].matrices[0].captured is None


def test_a_step_that_overflows_is_measured_as_that() -> None:
    """Watching must not raise where the step does not."""
    weights = {"w": Parameter(torch.ones(40, 24))}
    weights["w"].grad = torch.full((40, 24), 1e38)
    optimizer = optimizer_of(weights)
    optimizer.diagnose_next_step()
    optimizer.step()
    snapshot = Snapshot(1, tuple(optimizer.take_diagnostics()))
    [matrix] = read_diagnostics([to_record(snapshot)])[0].matrices
    assert matrix.captured is matrix.stable_rank is matrix.update_rms is matrix.update_norm is None
    assert matrix.energy_ranks == (None,) * 5
    assert "captured" not in by_kind(snapshot.matrices)["w"]


def test_known_spectrum() -> None:
    """B = diag(4, 2, 2, 1): energies 16, 4, 4, 1 of 25."""
    weights = {"diagonal": Parameter(torch.zeros(4, 4))}
    optimizer = optimizer_of(weights, rank_fraction=1.0)
    weights["diagonal"].grad = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0]))
    optimizer.diagnose_next_step()
    optimizer.step()
    [found] = optimizer.take_diagnostics()
    assert found.captured == pytest.approx(1, rel=1e-5)
    assert found.stable_rank == pytest.approx(25 / 16, rel=1e-5)
    # cumulative: 0.64, 0.80, 0.96, 1.0; of 0.5, 0.75, 0.9, 0.95, 0.99
    assert found.energy_ranks == (1, 2, 3, 3, 4)


class Operations(TorchDispatchMode):
    """Counts torch's operations, and the numbers in new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers += result.numel()
        return result


def test_an_unwatched_step_does_nothing_more() -> None:
    def operations_of_second_step(watch: tuple[bool, bool]) -> tuple[Counter[str], int]:
        weights = weights_of(SHAPES)
        optimizer = optimizer_of(weights)
        for step, is_watched in enumerate(watch):
            set_gradients(weights, step)
            if is_watched:
                optimizer.diagnose_next_step()
            with Operations() as counted:
                optimizer.step()
        return counted.calls, counted.numbers

    never = operations_of_second_step((False, False))
    assert operations_of_second_step((True, False)) == never
    assert operations_of_second_step((True, True))[0].total() > never[0].total()


def test_watching_changes_no_bit() -> None:
    watched, other = weights_of(SHAPES), weights_of(SHAPES)
    optimizers = [optimizer_of(watched), optimizer_of(other)]
    for step in range(3):
        optimizers[0].diagnose_next_step()
        for weights, optimizer in zip((watched, other), optimizers, strict=True):
            set_gradients(weights, step)
            optimizer.step()
    assert all(torch.equal(watched[name], other[name]) for name in watched)
    assert len(optimizers[0].take_diagnostics()) == 3 * len(SHAPES)
    assert optimizers[0].take_diagnostics() == []


def diagnosed(name: str, **figures: Any) -> MatrixDiagnostics:
    values: dict[str, Any] = {
        "rows": 8,
        "columns": 6,
        "rank": 2,
        "captured": 0.5,
        "stable_rank": 3.0,
        "orthonormality_error": 1e-6,
        "update_rms": 0.1,
        "update_norm": 0.2,
        "momentum_norm": 0.3,
        "owner_seconds": 0.4,
        "energy_ranks": (1, 2, None, None, None),
    }
    return MatrixDiagnostics(name, **values | figures)


def test_records_are_read_as_they_were_written() -> None:
    snapshot = Snapshot(20, (diagnosed("layers.0.fc2"), diagnosed("layers.10.fc2", captured=None)))
    other = {"kind": "train", "iteration": 20}
    assert read_diagnostics([other, to_record(snapshot)]) == [snapshot]


def test_records_have_few_digits_and_no_infinity() -> None:
    found = diagnosed("w", captured=1 / 3, stable_rank=math.inf)
    [matrix] = read_diagnostics([to_record(Snapshot(1, (found,)))])[0].matrices
    assert matrix.captured == 0.33333
    assert matrix.stable_rank is None


def test_records_of_another_version_are_refused() -> None:
    record = to_record(Snapshot(7, ())) | {"energy_levels": [0.9]}
    with pytest.raises(ValueError, match="diagnostics of iteration 7 have other figures"):
        read_diagnostics([record])


def test_kinds_hold_all_layers_and_experts() -> None:
    names = ("layers.0.experts.3.fc1[up]", "layers.11.experts.0.fc1[up]", "layers.2.fc1[up]")
    matrices = [
        diagnosed(name, captured=c) for name, c in zip(names, (0.1, 0.4, None), strict=True)
    ]
    found = by_kind([*matrices, diagnosed(names[0], captured=0.2)])
    assert list(found) == ["layers.*.experts.*.fc1[up]", "layers.*.fc1[up]"]
    assert found["layers.*.experts.*.fc1[up]"]["captured"] == Spread(0.1, 0.2, 0.4)
    assert "captured" not in found["layers.*.fc1[up]"]
