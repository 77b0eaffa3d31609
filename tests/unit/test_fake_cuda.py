"""What a step would ask of a GPU: launches, waits, copies and memory, on fake CUDA tensors."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_dion import Dion
from megatron_dion.algorithm import step
from megatron_dion.algorithm.step import Block
from megatron_dion.optimizer.norm_estimate import project
from megatron_dion.sharding.layout import Placement, dion_bucket_size
from megatron_dion.sharding.matrices import Part, Weight
from megatron_dion_tools.plan import PRESETS, place
from megatron_dion_tools.plan.stage import Optimizer, Run, Stage, default_bucket_size
from megatron_dion_tools.plan.topology import Topology
from megatron_dion_tools.plan.updates import adamw, muon, muon_matrices
from tests.fake_cuda import count, count_step, sharded, whole, with_gradients


def _plain(**options: Any) -> Callable[[], Dion]:
    return whole([(4096, 4096)] * 32, **options)


def _llama(tensor: int, data: int, has_buckets: bool) -> Callable[..., Callable[[], Dion]]:
    shape = PRESETS["8B"]
    weights = shape.weights(range(shape.layers), tensor)
    usual = default_bucket_size(data) if has_buckets else None
    size = usual and dion_bucket_size(sum(w.rows * w.columns for w in weights), usual)
    return _on_grid(place(weights, data, size), (tensor, 0), (data, min(3, data - 1)))


def _experts() -> Callable[..., Callable[[], Dion]]:
    """Four layers, of which a rank has 32 experts each."""
    parts = (Part("gate", 768), Part("up", 768))
    weights: list[Weight] = []
    for layer in range(4):
        names = [f"layers.{layer}.experts.{expert}" for expert in range(32)]
        weights += [Weight(f"{name}.fc1", 1536, 2048, parts=parts) for name in names]
        weights += [Weight(f"{name}.fc2", 2048, 768) for name in names]
    return _on_grid(place(weights, 8, None), (1, 0), (8, 3))


def _on_grid(
    placements: list[Placement], tensor: tuple[int, int], data: tuple[int, int]
) -> Callable[..., Callable[[], Dion]]:
    return lambda **options: sharded(placements, tensor, data, **options)


def _tiny() -> Callable[..., Callable[[], Dion]]:
    weights = [Weight(f"layers.{layer}.fc1", 64, 32) for layer in range(4)]
    return _on_grid(place(weights, 2, None), (1, 0), (2, 1))


CASES = {
    "plain": lambda: _plain,
    "8B": lambda: _llama(1, 1, has_buckets=False),
    "8B TP2 DP8": lambda: _llama(2, 8, has_buckets=False),
    "8B TP2 DP8, default buckets": lambda: _llama(2, 8, has_buckets=True),
    "8B TP1 DP64": lambda: _llama(1, 64, has_buckets=False),
    "experts, DP8": _experts,
}


BF16 = {"comm_dtype": "bf16", "momentum_dtype": "bf16", "factor_dtype": "bf16"}
STEPS: list[tuple[str, int, dict[str, Any]]] = [
    ("plain", 315, {"residual": "none"}),
    ("plain", 342, {}),
    ("8B", 2353, {}),
    ("8B TP2 DP8", 484, {"residual": "none"}),
    ("8B TP2 DP8", 566, {}),
    ("8B TP2 DP8, default buckets", 399, {"residual": "none"}),
    ("8B TP2 DP8, default buckets", 442, {}),
    ("8B TP2 DP8, default buckets", 350, {"rank_fraction": 1 / 16}),
    ("8B TP2 DP8, default buckets", 587, BF16),
    ("8B TP1 DP64", 185, {"residual": "none"}),
    ("8B TP1 DP64", 226, {}),
    ("8B TP1 DP64", 212, {"rank_fraction": 1 / 32}),
    ("8B TP2 DP8", 1534, {"rank_fraction": 1.0}),
    ("8B TP1 DP64", 229, {"momentum_dtype": "bf16"}),
    ("8B TP1 DP64", 230, {"comm_dtype": "bf16"}),
    ("8B TP1 DP64", 226, {"fp32_matmul_prec": "medium"}),
    ("8B TP1 DP64", 242, {"factor_dtype": "bf16", "comm_dtype": "bf16"}),
    ("8B TP1 DP64", 223, {"exchange_sets": 1, "rank_multiple_of": 16}),
    ("8B TP1 DP64", 232, {"exchange_sets": 4, "fp32_matmul_prec": "highest"}),
    ("8B TP2 DP8", 490, {"replicas": 2}),
    ("8B TP2 DP8", 522, {"replicas": 2, "comm_dtype": "bf16"}),
    ("experts, DP8", 182, {"residual": "none"}),
    ("experts, DP8", 224, {}),
    ("experts, DP8", 196, {"replicas": 2, "rank_fraction": 0.5}),  # gradients are averaged
]


@pytest.mark.parametrize(("case", "launches", "options"), STEPS)
def test_a_step_does_not_wait_and_copies_nothing(
    case: str, launches: int, options: dict[str, Any]
) -> None:
    counts = count_step(CASES[case]()(**options))
    # A plain Dion looks for gradients that are not finite; within Megatron, their norm is known.
    assert len(counts.waits) == (case == "plain"), counts.waits
    assert (counts.copies, counts.host_tensors) == ([], [])
    assert launches / 1.1 < counts.modelled < 1.1 * launches, counts.modelled
    assert counts.launches == launches, counts.lines.most_common(20)
    assert counts.peak / 1.03 < counts.planned < 1.3 * counts.peak, (counts.peak, counts.planned)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_planned_launches_of_other_optimizers(kind: str) -> None:
    stage = Stage(Run(PRESETS["8B"], Topology(), Optimizer(kind)), 0)
    if kind == "muon":
        muon_module = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon")
        shapes = [shape for weight in stage.weights for shape in muon_matrices(weight, False)]
        make, planned = muon_module.Muon, muon(stage)
    else:
        shapes = [(weight.rows, weight.columns) for weight in stage.weights]
        make, planned = partial(torch.optim.AdamW, fused=True), adamw(stage)

    def take(steps: int) -> None:
        optimizer = make(with_gradients(shapes))
        for _ in range(steps):
            optimizer.step()

    launches = count(lambda: take(2)).launches - count(lambda: take(1)).launches
    assert launches / 1.15 < planned.launches < 1.15 * launches, launches


def test_the_norm_of_compressed_gradients_takes_two_calls_for_each() -> None:
    counts = count(lambda: project([torch.empty(10**7, device="cuda") for _ in range(48)], 0, ""))
    assert (counts.waits, counts.copies, counts.host_tensors) == ([], [], [])
    assert counts.launches < 48 * 2 + 60, counts.lines.most_common(20)


def _with_host_tensor(block: Block) -> None:
    block.weight.add_(torch.ones(1).to("cuda"))


def _with_wait(block: Block) -> None:
    float(block.weight.sum())


def _with_launch(block: Block) -> None:
    block.weight.mul_(1)


def _with_temporary(_: Block) -> None:
    torch.empty(1 << 20, device="cuda")


@pytest.mark.parametrize("build", [whole([(8, 8)]), _tiny()()])
@pytest.mark.parametrize(
    ("fault", "changed"),
    [
        (_with_host_tensor, {"copies", "host_tensors", "launches"}),
        (_with_wait, {"waits", "launches"}),
        (_with_launch, {"launches"}),
        (_with_temporary, {"peak"}),
    ],
)
def test_faults_are_noticed(
    build: Callable[[], Dion], fault: Callable[[Block], None], changed: set[str]
) -> None:
    def load_right(blocks: Sequence[Block]) -> None:
        load(blocks)
        fault(blocks[0])

    right, load = vars(count_step(build)), step._load_right
    with mock.patch.object(step, "_load_right", load_right):
        wrong = vars(count_step(build))
    assert {name for name in right if right[name] != wrong[name]} - {"lines"} == changed
