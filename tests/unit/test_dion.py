import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_dion import Dion
from megatron_dion.algorithm import orthonormalize
from megatron_dion.algorithm import step as dion_step
from megatron_dion.algorithm.products import matmul_precision
from tests.reference import orthonormal_columns
from tests.unit.dion_cases import (
    SHAPES,
    TOLERANCES,
    Comparison,
    Shape,
    assert_bitwise_equal,
    draw,
    parameters,
)

STEPS = range(10)
BFLOAT16 = {"momentum_dtype": "bf16", "factor_dtype": "bf16"}
BFLOAT16_ROUNDING = 2.0**-8


@pytest.mark.parametrize(
    "options",
    [
        *({"scale_mode": mode} for mode in ("dion", "spectral", "unit_rms_norm")),
        {"weight_decay": 0.5},
        {"momentum": 0.0},
        {"rank_fraction": 0.5, "rank_multiple_of": 4},
        {"rank_fraction": 1.0, "momentum": 0.0},
        {"extra_scale_factor": 0.1, "eps": 1e-3, "seed": 5},
        {"residual": "none"},
        {"residual": "none", "rank_fraction": 0.6, "momentum": 0.0, "eps": 1e-2},
    ],
    ids=str,
)
def test_ten_steps_follow_the_reference(options: dict[str, Any]) -> None:
    comparison = Comparison([(SHAPES, {})], **options)
    comparison.run(STEPS, after_step=comparison.assert_equal)


@pytest.mark.parametrize("batch", [100, 1 << 25])
@pytest.mark.parametrize("residual", ["none", "rows"])
def test_the_calls_of_a_gpu_follow_the_reference(
    residual: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dion_step, "_BATCH_NUMBERS", batch)  # less than R of one matrix, and more
    for module in (dion_step, orthonormalize):
        monkeypatch.setattr(module, "is_cpu", lambda _: False)
    comparison = Comparison([(SHAPES * 3, {})], residual=residual, weight_decay=0.5)
    comparison.run(STEPS, after_step=comparison.assert_equal)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_is_set_for_a_step_alone(precision: str) -> None:
    """A step goes where a user has set torch's switches, and leaves them as they were."""
    comparison = Comparison([(SHAPES, {})], fp32_matmul_prec=precision)
    with matmul_precision("high"):
        comparison.run(STEPS)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    comparison.assert_equal({"weight": 3e-3, "momentum": 3e-2, "right_factor": 0.3})


def test_groups_have_their_own_learning_rate_and_weight_decay_and_follow_a_scheduler() -> None:
    groups: list[Any] = [([(6, 4)], {}), ([(5, 9)], {"lr": 0.2}), ([(7, 3)], {"weight_decay": 2.0})]
    comparison = Comparison(groups, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(comparison.optimizer, T_max=12)
    comparison.run(STEPS, after_step=scheduler.step)
    comparison.assert_equal()
    assert comparison.optimizer.param_groups[1]["lr"] < 0.05


@pytest.mark.parametrize(("shape", "rank"), [((9, 16), 4), ((16, 9), 4), ((1, 9), 1), ((30, 1), 1)])
def test_init_state_allocates_the_documented_shapes(shape: Shape, rank: int) -> None:
    (parameter,) = parameters([shape])
    optimizer = Dion([parameter], rank_fraction=1 / 3, rank_multiple_of=2)
    optimizer.bind()
    state = optimizer.state[parameter]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "momentum": shape,
        "right_factor": (shape[0], rank),
    }
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert not state["momentum"].any()
    assert optimizer.param_groups[0]["step"] == 0


def first_right_factors(params: Any, seed: int = 0) -> list[Tensor]:
    optimizer = Dion(params, seed=seed)
    optimizer.bind()
    groups = optimizer.param_groups
    return [optimizer.state[p]["right_factor"] for group in groups for p in group["params"]]


def test_names_seed_the_right_factor() -> None:
    a, b = parameters([(8, 5), (8, 5)])
    one, other = first_right_factors([("one", a), ("other", b)])
    assert not torch.equal(one, other)
    assert torch.equal(other, first_right_factors([("other", a)])[0])  # whatever its position
    assert not torch.equal(one, first_right_factors([("one", a)], seed=1)[0])
    by_position = first_right_factors([a, b])
    assert not torch.equal(by_position[0], by_position[1])
    assert torch.equal(by_position[1], first_right_factors([{"params": [a]}, {"params": b}])[1])


def test_parameters_without_gradient_are_skipped_and_disturb_nobody() -> None:
    comparison = Comparison([([(6, 4), (5, 9)], {}), ([(6, 4)], {})], weight_decay=0.1)
    present = [{"0.0"}, {"0.0", "0.1"}, set(), {"0.1", "1.0"}, {"0.0", "0.1", "1.0"}, {"1.0"}]
    for step, names in enumerate(present):
        skipped = {
            name: comparison.named[name].detach().clone()
            for name in comparison.named.keys() - names
        }
        comparison.step({name: comparison.gradient(name, step) for name in names})
        for name, before in skipped.items():
            assert torch.equal(comparison.named[name], before)
    comparison.assert_equal()


def zeros(comparison: Comparison) -> dict[str, Tensor]:
    return {name: torch.zeros_like(parameter) for name, parameter in comparison.named.items()}


def test_zero_gradient_from_the_start_is_a_clean_no_op() -> None:
    comparison = Comparison([(SHAPES, {})])
    comparison.optimizer.bind()
    before = comparison.copies()
    for _ in range(3):
        comparison.step(zeros(comparison))
    assert_bitwise_equal(comparison.copies(), before)
    comparison.run(STEPS)
    comparison.assert_equal()


@pytest.mark.parametrize("true_rank", [1, 2])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (8, 8)])
@pytest.mark.parametrize("factor", [1.0, 1e30])
def test_directions_without_gradient_are_left_alone(
    factor: float, shape: Shape, true_rank: int
) -> None:
    m, n = shape
    comparison = Comparison([([shape], {})], rank_fraction=0.7, momentum=0.9)
    left, right = draw((m, true_rank), 0), draw((true_rank, n), 1)
    comparison.optimizer.bind()
    first = comparison.tensors("0.0")["right_factor"].clone()
    for step in STEPS:
        comparison.step({"0.0": left @ right * (step + 1) * factor})
        comparison.assert_equal(dict.fromkeys(TOLERANCES, 0.0001))
    last = comparison.tensors("0.0")["right_factor"]
    unchanged = (last == first).all(dim=0)
    assert unchanged.tolist() == [False] * true_rank + [True] * (first.shape[1] - true_rank)


@pytest.mark.parametrize("factor", [1e30, 1e-30])
@pytest.mark.parametrize("options", [{}, {"residual": "none"}, BFLOAT16], ids=str)
def test_huge_and_tiny_gradients_stay_finite(options: dict[str, str], factor: float) -> None:
    comparison = Comparison([(SHAPES, {})], **options)
    for step in STEPS:
        comparison.step(
            {name: comparison.gradient(name, step, factor) for name in comparison.named}
        )
    assert all(tensor.isfinite().all() for tensor in comparison.copies().values())
    for parameter in comparison.named.values():
        assert parameter.abs().max().item() < 10  # no step moves it by more than lr scale sqrt(r)
    if factor > 1 and options != BFLOAT16:
        comparison.assert_equal()


@pytest.mark.parametrize("last", [0, -2, -4, -7])
def test_rows_of_which_little_is_left(last: int) -> None:
    """Spectra that fall so far that E is signal, at the floor, or rounding noise."""
    comparison = Comparison([([(40, 30)], {})], rank_fraction=0.5)
    left, right = (torch.linalg.qr(draw((size, 30), size)).Q for size in (40, 30))
    gradient = left * torch.logspace(0, last, 30) @ right.T
    for _ in STEPS:
        comparison.step({"0.0": gradient})
    comparison.assert_equal({"weight": 1e-5, "momentum": 1e-5, "right_factor": 1e-2})


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_non_finite_gradient_is_an_error_that_changes_nothing(
    broken: float, steps_before: int
) -> None:
    shapes = [(6, 4), (5, 9), (3, 2)]
    disturbed, undisturbed = (Comparison([(shapes, {})]) for _ in range(2))
    for comparison in (disturbed, undisturbed):
        comparison.run(range(steps_before))
    before = disturbed.copies()
    gradients = {name: disturbed.gradient(name, 77) for name in disturbed.named}
    gradients["0.0"][2, 3] = gradients["0.2"][1, 1] = broken
    for name, parameter in disturbed.named.items():
        parameter.grad = gradients[name]
    with pytest.raises(FloatingPointError, match=r"^gradient is not finite: 0\.0, 0\.2$"):
        disturbed.optimizer.step()
    assert_bitwise_equal(disturbed.copies(), before)
    assert disturbed.optimizer.param_groups[0]["step"] == steps_before
    for comparison in (disturbed, undisturbed):
        comparison.run(STEPS)
    assert_bitwise_equal(disturbed.copies(), undisturbed.copies())


@pytest.mark.parametrize("options", [{}, BFLOAT16], ids=["fp32", "bf16"])
def test_saved_and_loaded_optimizer_continues_bitwise_equal(options: dict[str, str]) -> None:
    groups: list[Any] = [(SHAPES, {}), ([(6, 4)], {"lr": 0.5})]
    saved, loaded = (Comparison(groups, weight_decay=0.1, **options) for _ in range(2))
    saved.run(range(4))
    loaded.run(range(7, 9))  # what it had is replaced
    file = io.BytesIO()
    torch.save(saved.optimizer.state_dict(), file)
    file.seek(0)
    loaded.optimizer.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for name, parameter in loaded.named.items():
            parameter.copy_(saved.named[name])
    for comparison in (saved, loaded):
        comparison.run(range(4, 8))
    assert_bitwise_equal(saved.copies(), loaded.copies())
    assert loaded.optimizer.param_groups[1]["step"] == 8


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(4), r"2-D float32 matrices; layer is \(4,\) torch.float32"),
        (torch.ones(3, 2, dtype=torch.bfloat16), r"layer is \(3, 2\) torch.bfloat16"),
        (torch.ones(2, 3).T, "contiguous parameters; layer is empty or strided"),
    ],
    ids=["1-D", "bfloat16", "transposed"],
)
def test_unsuitable_parameter_is_refused_by_name(tensor: Tensor, message: str) -> None:
    parameter = Parameter(tensor)
    optimizer = Dion([("layer", parameter)])
    parameter.grad = torch.ones_like(parameter)
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match=message):
        optimizer.bind()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("options", [{"lr": -0.1}, {"weight_decay": -0.1}, {"momentum": 1.0}])
def test_value_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Dion(parameters([(3, 2)]), **options)  # type: ignore[arg-type]


def test_closure_computes_gradients_and_its_loss_is_returned() -> None:
    (weight,) = parameters([(6, 4)])
    optimizer = Dion([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    first = weight.square().sum().item()
    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[0] == pytest.approx(first)
    assert losses == sorted(losses, reverse=True)


def test_a_measured_run_is_the_same_run() -> None:
    measured, other = (Comparison([([(6, 4), (5, 9)], {})]) for _ in range(2))
    for step in range(3):
        measured.optimizer.diagnose_next_step()
        measured.run([step])
        other.run([step])
        assert len(measured.optimizer.take_diagnostics()) == 2
    assert_bitwise_equal(measured.copies(), other.copies())


def test_gradients_are_not_changed() -> None:
    comparison = Comparison([([(6, 4)], {})])
    comparison.run(range(3))
    assert torch.equal(comparison.named["0.0"].grad, comparison.gradient("0.0", 2))  # type: ignore[arg-type]


def continue_from_stored(comparison: Comparison) -> None:
    """Makes the references' states those of the optimizer, rounded as they are."""
    for name, reference in comparison.references.items():
        state = comparison.optimizer.state[comparison.named[name]]
        reference.momentum = state["momentum"].double()
        reference.right_factor = state["right_factor"].double()
        reference.weight = comparison.named[name].detach().double()


@pytest.mark.parametrize("momentum_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("factor_dtype", ["fp32", "bf16"])
def test_stored_dtypes_round_the_state_and_nothing_else(
    factor_dtype: str, momentum_dtype: str
) -> None:
    """From equal states, a step leads to the reference's state, rounded, and to its weights."""
    dtypes = {"momentum": momentum_dtype, "right_factor": factor_dtype}
    comparison = Comparison(
        [(SHAPES, {})],
        momentum_dtype=momentum_dtype,
        factor_dtype=factor_dtype,
        weight_decay=0.1,
    )
    comparison.optimizer.bind()
    rounding = {
        what: BFLOAT16_ROUNDING if dtype == "bf16" else 0.0 for what, dtype in dtypes.items()
    }
    tolerances = {what: t + rounding.get(what, 0.0) for what, t in TOLERANCES.items()}
    for step_number in STEPS:
        continue_from_stored(comparison)
        comparison.run([step_number])
        comparison.assert_equal(tolerances)
    for parameter in comparison.named.values():
        state = comparison.optimizer.state[parameter]
        found = {what: tensor.dtype for what, tensor in state.items()}
        torch_dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        assert found == {what: torch_dtypes[dtype] for what, dtype in dtypes.items()}


@pytest.mark.parametrize("options", [BFLOAT16, {"comm_dtype": "bf16"}], ids=str)
def test_dtypes_change_the_run_also_of_a_single_process(options: dict[str, str]) -> None:
    """So the tolerance of the test above is not needlessly wide: a rounded state is not exact."""
    comparison = Comparison([(SHAPES, {})], **options)
    comparison.run(range(3))
    with pytest.raises(AssertionError, match=r"weight|momentum|right_factor"):
        comparison.assert_equal()


def test_an_unknown_hyperparameter_is_refused() -> None:
    with pytest.raises(TypeError, match="orthonormalizer"):
        Dion(parameters([(3, 2)]), orthonormalizer="qr")


@pytest.mark.parametrize(
    "options",
    [{}, {"residual": "none"}, {"residual": "none", "rank_fraction": 1.0}, BFLOAT16],
    ids=str,
)
def test_diagnostics_are_those_of_the_reference(options: dict[str, Any]) -> None:
    comparison = Comparison([(SHAPES, {})], **options)
    comparison.run(range(3))
    gradients = {name: comparison.gradient(name, 3) for name in comparison.named}
    totals = {name: r.momentum + gradients[name] for name, r in comparison.references.items()}
    before = {name: (r.weight, r.right_factor) for name, r in comparison.references.items()}
    comparison.optimizer.diagnose_next_step()
    comparison.step(gradients)
    tolerance = 1e-4 if "residual" in options else 2e-2  # of bf16, of the floor
    measured = comparison.optimizer.take_diagnostics()
    assert [one.name for one in measured] == list(comparison.named)
    for one in measured:
        reference, total = comparison.references[one.name], totals[one.name]
        weight, right_factor = before[one.name]
        captured = (total @ orthonormal_columns(total.T @ right_factor)).norm() / total.norm()
        update = (reference.weight - weight).norm()
        assert one.captured == pytest.approx(float(captured), tolerance)
        assert one.update_norm == pytest.approx(float(update), tolerance)
        assert one.momentum_norm == pytest.approx(float(reference.momentum.norm()), tolerance)
    comparison.run([4])
    assert not comparison.optimizer.take_diagnostics()
