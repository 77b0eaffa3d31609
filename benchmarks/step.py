"""How long does the optimizer's step take on one process, and how long must it?

Two tables. `floor`: Dion's step on many equal matrices against the matrix products that it must do:
the four of shapes (m, n) and r, timed with the layouts that the step has, and the operations of the
orthonormalization, those of `auto`, or Householder QR's, at the rate of a product (n, r)
(r, r). `weights`: AdamW, Megatron's Muon, and
Dion with products in float32 and in Muon's precision, on the weights of a GPT.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._common import (
    Case,
    Goal,
    Row,
    Timing,
    interleaved,
    largest,
    make_parser,
    parse,
    preload_megatron,
    ratio,
    report,
    summary,
)
from benchmarks._models import (
    LR,
    WEIGHT_DECAY,
    Topology,
    checked_step,
    dion_on_pieces,
    gpt,
    with_gradient,
)
from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm import Matrix
from megatron_dion.platforms.cpu_adam import CpuAdam
from megatron_dion.sharding.balance import operations
from megatron_dion_tools.plan import GptShape
from megatron_dion_tools.plan.compute import orthonormalization

FRACTIONS = tuple(Fraction(1, k) for k in (16, 8, 4, 2, 1))


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables."""
    args = _parse(argv)
    torch.manual_seed(0)
    goals: list[Goal] = []
    tables = {
        "floor": [row for alike in args.matrices for row in _floor_rows(alike, args, goals)],
        "weights": [row for hidden in args.hidden for row in _weight_rows(hidden, args, goals)],
    }
    report(args, tables, goals)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument(
        "--matrices",
        type=Alike.parse,
        nargs="*",
        default=[Alike(4, 1024, 1.15), Alike(64, 256, 1.5)],
        metavar="COUNTxSIZE",
        help="square matrices of the first table; none: no such table",
    )
    parser.add_argument(
        "--hidden", type=int, nargs="*", default=[512, 1024], help="widths of the second table"
    )
    parser.add_argument("--layers", type=int, default=1, help="layers of the second table")
    parser.add_argument("--fractions", type=Fraction, nargs="+", default=FRACTIONS)
    return parse(parser, argv)


@dataclass(frozen=True)
class Alike:
    """Some square matrices of one size.

    Attributes:
        count: how many.
        size: rows and columns.
        limit: what a step may take, as a multiple of the floor.
    """

    count: int
    size: int
    limit: float = 1.5

    @classmethod
    def parse(cls, text: str) -> "Alike":
        """Reads `4x1024`."""
        count, size = map(int, text.split("x"))
        return cls(count, size)


def _floor_rows(alike: Alike, args: argparse.Namespace, goals: list[Goal]) -> list[Row]:
    """A row for each rank fraction; all of them are measured in turns."""
    floors = {fraction: _Floor(alike, fraction, args.device) for fraction in args.fractions}
    cases = {
        f"{fraction} {name}": case
        for fraction, floor in floors.items()
        for name, case in floor.cases().items()
    }
    timings = interleaved(cases, args.repeats)
    rows = []
    for fraction, floor in floors.items():
        of = {name: timings[f"{fraction} {name}"] for name in floor.cases()}
        rows.append(floor.row(of))
    name = f"{alike.count} of {alike.size} x {alike.size}: step / floor, all rank fractions"
    goals.append(Goal(name, largest(rows, "step_to_floor") or 0, alike.limit))
    return rows


class _Floor:
    """Dion's step on equal matrices, and the products that it must do."""

    def __init__(self, alike: Alike, fraction: Fraction, device: str) -> None:
        m = n = alike.size
        self._alike, self._fraction, self._device = alike, fraction, device
        config = DionConfig(rank_fraction=float(fraction))
        self._matrix = Matrix("", m, n, config.rank(m, n))
        r = self._matrix.rank
        weights = [
            with_gradient(0.02 * torch.randn(m, n, device=device)) for _ in range(alike.count)
        ]
        self._optimizer = Dion(weights, lr=LR, weight_decay=WEIGHT_DECAY, **vars(config))
        self._operands = [
            _Operands(
                weight=torch.randn(m, n, device=device),
                total=torch.randn(m, n, device=device),
                right=torch.randn(m, r, device=device) / m**0.5,
                left=torch.randn(n, r, device=device) / n**0.5,
                projection=torch.randn(m, r, device=device) / m**0.5,
                square=torch.randn(r, r, device=device) / r**0.5,
            )
            for _ in range(alike.count)
        ]

    def cases(self) -> dict[str, Case]:
        """The step, the four products, the product that stands for the orthonormalization."""
        return {
            "step": Case(self._optimizer.step),
            "products": Case(lambda: _four_products(self._operands)),
            "square": Case(lambda: [o.left @ o.square for o in self._operands]),
        }

    def row(self, timings: Mapping[str, Timing]) -> Row:
        """What was measured, as medians, and the median of each round's ratio."""
        matrix = self._matrix
        n, r = matrix.columns, matrix.rank
        cost = {name: timing.cost(self._device) for name, timing in timings.items()}
        products = cost["products"]
        _, householder = orthonormalization(DionConfig(), np.array(float(n)), r, "qr")
        orthonormalize, fewest = (
            [count / (2 * n * r**2) * seconds for seconds in cost["square"]]
            for count in (operations(matrix, n), float(householder))
        )
        to_floor, to_fewest = (
            ratio(cost["step"], [a + b for a, b in zip(products, other, strict=True)])
            for other in (orthonormalize, fewest)
        )
        rate = 8 * matrix.rows * matrix.columns * matrix.rank * self._alike.count / 1e9
        return {
            "matrices": f"{self._alike.count} x {self._alike.size}",
            "fraction": str(self._fraction),
            "rank": r,
            "products_ms": 1e3 * summary(products).median,
            "products_gflops": rate / summary(products).median,
            "orthonormalize_ms": 1e3 * summary(orthonormalize).median,
            "step_ms": 1e3 * summary(cost["step"]).median,
            "step_wall_ms": 1e3 * summary(timings["step"].wall).median,
            "step_to_floor": to_floor.median,
            "low": to_floor.low,
            "high": to_floor.high,
            "step_to_fewest": to_fewest.median,
        }


@dataclass(frozen=True)
class _Operands:
    """Of one matrix: W, B (m, n), Q, R (m, r), P (n, r), and something (r, r)."""

    weight: Tensor
    total: Tensor
    right: Tensor
    left: Tensor
    projection: Tensor
    square: Tensor


def _four_products(operands: Sequence[_Operands]) -> None:
    """As in megatron_dion/algorithm/step.py, matrix after matrix in each phase."""
    for o in operands:
        torch.mm(o.total.T, o.right, out=o.left)  # (n, r)
    for o in operands:
        torch.mm(o.total, o.left, out=o.projection)  # (m, r)
    for o in operands:
        o.total.addmm_(o.projection, o.left.T, alpha=-1e-9)
        o.weight.addmm_(o.right, o.left.T, beta=1 - 1e-6, alpha=-1e-9)


def _weight_rows(hidden: int, args: argparse.Namespace, goals: list[Goal]) -> list[Row]:
    """All optimizers on the same shapes in turns, with fp32 and with bf16 weights."""
    shape = gpt(hidden, args.layers)
    optimizers = {
        "AdamW, torch": _torch_adamw(shape, args.device),
        "AdamW, Megatron on CPU": _megatron_adamw(shape, args.device),
        _MUON: _muon(shape, args.device),
        _MUON_FP32: _muon(shape, args.device, precision="highest"),
        **{f"Dion {f}": _dion(shape, f, args.device) for f in reversed(args.fractions)},
        **{
            f"Dion {f}, {_LIKE_MUON}": _dion(shape, f, args.device, precision="medium")
            for f in reversed(args.fractions)
        },
    }
    return [
        row
        for dtype in ("fp32", "bf16")
        for row in _rows_of_dtype(shape, dtype, optimizers, args, goals)
    ]


@dataclass(frozen=True)
class _Optimizer:
    """An optimizer's step, and the float32 weights that it steps."""

    step: Callable[[], object]
    weights: Sequence[Tensor]

    def with_bf16_weights(self) -> Callable[[], None]:
        """The step of Megatron with bf16 weights: these are rounded from the masters after it."""
        rounded = [weight.bfloat16() for weight in self.weights]

        def step() -> None:
            self.step()
            torch._foreach_copy_(rounded, list(self.weights))

        return step


def _rows_of_dtype(
    shape: GptShape,
    dtype: str,
    optimizers: Mapping[str, _Optimizer],
    args: argparse.Namespace,
    goals: list[Goal],
) -> list[Row]:
    cases = {
        name: Case(optimizer.step if dtype == "fp32" else optimizer.with_bf16_weights())
        for name, optimizer in optimizers.items()
    }
    timings = interleaved(cases, args.repeats)
    muon, in_fp32 = (timings[name].cost(args.device) for name in (_MUON, _MUON_FP32))
    rows: list[Row] = []
    for name, timing in timings.items():
        cost = timing.cost(args.device)
        to_muon, to_fp32 = ratio(cost, muon), ratio(cost, in_fp32)
        rows.append(
            {
                "hidden": shape.hidden,
                "layers": shape.layers,
                "weights": dtype,
                "optimizer": name,
                "step_ms": 1e3 * summary(cost).median,
                "step_wall_ms": 1e3 * summary(timing.wall).median,
                "to_muon": to_muon.median,
                "low": to_muon.low,
                "high": to_muon.high,
                "to_muon_fp32": to_fp32.median,
            }
        )
        dion, _, in_bf16 = name.partition(", ")
        if dion in _TO_MUON:
            label = f"hidden {shape.hidden}, {dtype} weights: {name} / "
            goals.append(Goal(label + _MUON, to_muon.median, _TO_MUON[dion]))
            if not in_bf16:
                goals.append(Goal(label + _MUON_FP32, to_fp32.median, _TO_MUON[dion]))
    return rows


_MUON, _MUON_FP32 = "Muon, Megatron", "Muon, Newton-Schulz in fp32"
_LIKE_MUON = "products in bf16"
_TO_MUON = {"Dion 1/4": 1 / 5, "Dion 1/16": 1 / 10}


def _masters(shape: GptShape, device: str) -> list[Tensor]:
    """The weights of a GPT (rows, columns), with gradients."""
    weights = shape.weights(range(shape.layers))
    return [
        with_gradient(torch.nn.Parameter(0.02 * torch.randn(w.rows, w.columns, device=device)))
        for w in weights
    ]


def _torch_adamw(shape: GptShape, device: str) -> _Optimizer:
    weights = _masters(shape, device)
    adamw = torch.optim.AdamW(weights, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return _Optimizer(adamw.step, weights)


def _megatron_adamw(shape: GptShape, device: str) -> _Optimizer:
    """What Megatron runs with on CPU; on a GPU it takes apex's or Transformer Engine's."""
    weights = _masters(shape, device)
    return _Optimizer(CpuAdam(weights, lr=LR, weight_decay=WEIGHT_DECAY).step, weights)


def _muon(shape: GptShape, device: str, precision: str = "medium") -> _Optimizer:
    """With the options that Megatron gives it; by default (`medium`) Newton-Schulz is in bf16.

    Megatron splits fused query, key and value, and leaves gate and up projection one matrix.
    """
    if device == "cpu":
        preload_megatron()
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.emerging_optimizers import (
        TensorParallelMuon,
        _muon_config_to_kwargs,
    )

    weights: list[Any] = _masters(shape, device)
    for master, weight in zip(weights, shape.weights(range(shape.layers)), strict=True):
        master.is_qkv = "linear_qkv" in weight.name
    config = OptimizerConfig(
        optimizer="muon", lr=LR, weight_decay=WEIGHT_DECAY, muon_fp32_matmul_prec=precision
    )
    model = SimpleNamespace(
        config=SimpleNamespace(
            num_attention_heads=shape.heads,
            num_query_groups=shape.query_groups,
            kv_channels=shape.head,
        )
    )
    options = _muon_config_to_kwargs(config, [model], None)
    return _Optimizer(TensorParallelMuon(weights, **options).step, weights)


def _dion(shape: GptShape, fraction: Fraction, device: str, precision: str = "high") -> _Optimizer:
    """By default in float32; on a GPU in TF32."""
    config = DionConfig(rank_fraction=float(fraction), fp32_matmul_prec=precision)
    dion = dion_on_pieces(shape, Topology(), config, device=device)
    [group] = dion.param_groups
    return _Optimizer(lambda: checked_step(dion), group["params"])


if __name__ == "__main__":
    main()
