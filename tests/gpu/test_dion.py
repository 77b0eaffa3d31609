"""The algorithm and its exchange on CUDA, with torch only, against the float64 reference."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks._models import Topology, dion_on_pieces, gpt
from benchmarks.gpu import host_waits, orthonormalize_errors, same_bits, sync_debug_mode
from megatron_dion import DionConfig
from megatron_dion.algorithm.orthonormalize import orthonormalize
from megatron_dion.algorithm.products import matmul_precision
from tests.distributed import sharded
from tests.gpu.run import on_ranks
from tests.unit.dion_cases import OF_TF32, TOLERANCES, Comparison, assert_bitwise_equal, draw

SHAPES = [(1, 7), (6, 1), (20, 6), (200, 136), (96, 160), (64, 256)]
RESIDUALS = pytest.mark.parametrize("residual", ["none", "rows"])


@pytest.mark.parametrize(("batch", "rows", "rank"), [(3, 40, 8), (2, 300, 200), (1, 1500, 640)])
@pytest.mark.parametrize(("condition", "tolerance"), [(30, 2e-5), (1e4, 2e-3)])
def test_orthonormal(
    device: str, batch: int, rows: int, rank: int, condition: float, tolerance: float
) -> None:
    errors = orthonormalize_errors(batch, rows, rank, condition, device)
    assert max(errors.values()) < tolerance


def test_dependent_columns_are_zero(device: str) -> None:
    p = draw((300, 80), seed=0)
    p[:, 20], p[:, 40], p[:, 60] = p[:, 5] + p[:, 7], p[:, 3], 0
    q = p.unsqueeze(0).to(device)
    with matmul_precision("highest"):
        orthonormalize([q], lambda tensor, operation: None)
    assert (q[0].norm(dim=0) == 0).nonzero().flatten().tolist() == [20, 40, 60]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@RESIDUALS
def test_steps_follow_the_reference(device: str, precision: str, residual: str) -> None:
    options = {"residual": residual, "fp32_matmul_prec": precision}
    comparison = Comparison([(SHAPES, {})], device, weight_decay=0.1, **options)
    tolerances = TOLERANCES if precision == "highest" else OF_TF32
    comparison.run(range(10), after_step=lambda: comparison.assert_equal(tolerances))
    if device == "cuda" and precision != "highest":
        with pytest.raises(AssertionError):
            comparison.assert_equal()  # it was TF32


@pytest.mark.parametrize("name", ["normal", "signs"])
def test_random_numbers_have_the_bits_of_the_cpu(device: str, name: str) -> None:
    assert same_bits(name, device)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(device: str, broken: float) -> None:
    disturbed, other = (Comparison([(SHAPES, {})], device) for _ in range(2))
    for comparison in (disturbed, other):
        comparison.run(range(2))
    for name, parameter in disturbed.named.items():
        parameter.grad = disturbed.gradient(name, 77).to(device)
    disturbed.named["0.2"].grad[2, 3] = broken  # type: ignore[index]
    with pytest.raises(FloatingPointError, match=r"^gradient is not finite: 0\.2$"):
        disturbed.optimizer.step()
    assert_bitwise_equal(disturbed.copies(), other.copies())
    for comparison in (disturbed, other):
        comparison.run(range(2, 4))
    assert_bitwise_equal(disturbed.copies(), other.copies())


@RESIDUALS
def test_the_host_waits_at_most_once(cuda: str, residual: str) -> None:
    comparison = Comparison([(SHAPES, {})], cuda, residual=residual)
    comparison.run(range(2))
    assert len(host_waits(comparison.optimizer.step)) <= 1  # is every gradient finite?


@RESIDUALS
def test_the_host_never_waits_in_a_step_within_megatron(cuda: str, residual: Any) -> None:
    """Megatron has the gradients' norm; it says whether they are finite."""
    shape, config = gpt(128, 2), DionConfig(residual=residual)
    dion = dion_on_pieces(shape, Topology(), config, device=cuda)
    dion.step()  # allocates the state, and makes the views of a step
    torch.cuda.synchronize()
    with sync_debug_mode("error"):
        dion.step()
        with pytest.raises(RuntimeError, match="synchronizing"):
            dion.param_groups[0]["params"][0].sum().item()


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@RESIDUALS
def test_shards_follow_the_reference(
    tmp_path: Path, device: str, tp: int, dp: int, residual: str
) -> None:
    """Over NCCL; a world of one sends nothing, but for the rest it takes the same way."""
    options: dict[str, Any] = {"rank_fraction": 0.3, "residual": residual}
    options["fp32_matmul_prec"] = "highest"
    args = (device, str(tp), str(dp), json.dumps(options))
    results = on_ranks(tp * dp, "train_shards", tmp_path, *args, device=device)
    shapes = (*sharded.TRANSFORMER, *sharded.ODD)
    sharded.compare(results, sharded.reference(shapes, DionConfig(**options)), tolerance=1e-5)
    assert all(abs(result.sent - result.planned) <= 8 for result in results)
