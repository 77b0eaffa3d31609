"""How long does the optimizer's step take on one process, and how long must it?

Two tables. `floor`: Dion's step on equal square matrices, beside the matrix products that it must
do: the four of shapes (m, n) and r, in the layouts of the step, and the operations of the
orthonormalization at the rate of a product (n, r) (r, r); and the step along the residual, too,
beside the one without. `weights`: AdamW, Megatron's Muon and Dion on the weights of a GPT.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import Row, interleaved, make_parser, parse, ratio, report, summary
from benchmarks._models import (
    LR,
    WEIGHT_DECAY,
    Topology,
    checked_step,
    dion_on_pieces,
    gpt,
    masters,
    with_gradient,
)
from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm.orthonormalize import orthonormalize_flops
from megatron_dion.algorithm.products import matmul_precision
from megatron_dion_tools.local.preload import preload
from megatron_dion_tools.plan import GptShape

MUON = "Muon"
HAS_MEGATRON = find_spec("megatron") is not None
# The step, the step along the residual, the four products, and a product (n, r) (r, r).
_MEASURED = ("step", "rows", "products", "square")
Step = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    args = _parse(argv)
    if args.hidden and not HAS_MEGATRON:
        print("the table weights has no Muon: that needs megatron-core, which is not installed")
    torch.manual_seed(0)
    report(args, _tables(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument(
        "--matrices",
        type=Alike.parse,
        nargs="*",
        default=[Alike(4, 1024), Alike(64, 256)],
        metavar="COUNTxSIZE",
        help="square matrices of the first table; none: no such table",
    )
    parser.add_argument(
        "--hidden", type=int, nargs="*", default=[512, 1024], help="widths of the second table"
    )
    parser.add_argument("--layers", type=int, default=1, help="layers of the second table")
    parser.add_argument(
        "--fractions", type=Fraction, nargs="+", default=[Fraction(1, k) for k in (16, 8, 4, 2, 1)]
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        default=DionConfig.fp32_matmul_prec,
        help="of the large products, in Dion and in the floor: --dion-fp32-matmul-prec",
    )
    return parse(parser, argv)


def _tables(args: argparse.Namespace) -> Iterator[tuple[str, list[Row]]]:
    options = (args.precision, args.repeats, args.device)
    yield "floor", [row for a in args.matrices for row in floor_rows(a, args.fractions, *options)]
    yield "weights", [row for hidden in args.hidden for row in _weight_rows(hidden, args)]


@dataclass(frozen=True)
class Alike:
    """`count` square matrices of `size` rows and columns."""

    count: int
    size: int

    @classmethod
    def parse(cls, text: str) -> "Alike":
        """Reads `4x1024`."""
        return cls(*map(int, text.split("x")))


def floor_rows(
    alike: Alike, fractions: Sequence[Fraction], precision: str, repeats: int, device: str
) -> list[Row]:
    """Returns a row for each rank fraction; all of them are measured in turns.

    Args:
        alike: the matrices.
        fractions: of their ranks.
        precision: of the large products, of the step and of its floor.
        repeats: number of measurements.
        device: `cpu` or `cuda`.
    """
    cases: dict[str, Step] = {}
    for fraction in fractions:
        cases |= _floor_cases(alike, fraction, precision, device)
    times = interleaved(cases, repeats, device)
    return [
        _floor_row(alike, f, precision, {name: times[f"{f} {name}"] for name in _MEASURED})
        for f in fractions
    ]


def _floor_cases(alike: Alike, fraction: Fraction, precision: str, device: str) -> dict[str, Step]:
    """Returns what is measured of all matrices: `_MEASURED`."""
    n, r = alike.size, DionConfig(rank_fraction=float(fraction)).rank(alike.size, alike.size)
    each = range(alike.count)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device) / shape[0] ** 0.5

    def dion(residual: str) -> Dion:
        weights = [with_gradient(0.02 * random(n, n)) for _ in each]
        options: dict[str, Any] = {"residual": residual, "fp32_matmul_prec": precision}
        options["rank_fraction"] = float(fraction)
        return Dion(weights, lr=LR, weight_decay=WEIGHT_DECAY, **options)

    operands = [(random(n, n), random(n, n), random(n, r), random(n, r)) for _ in each]
    squares = [(random(n, r), random(r, r)) for _ in each]

    def products() -> None:
        with matmul_precision(precision):
            _four_products(operands)

    def square() -> None:
        with matmul_precision("highest"):  # as the step orthonormalizes
            for left, right in squares:
                left @ right

    return {
        f"{fraction} step": dion("none").step,
        f"{fraction} rows": dion("rows").step,
        f"{fraction} products": products,
        f"{fraction} square": square,
    }


def _four_products(operands: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """Computes P = B^T Q, R = B P, B - R P^T and W - Q P^T as the step does."""
    for _, total, right, left in operands:
        torch.mm(total.T, right, out=left)
    rows = [total @ left for _, total, _, left in operands]
    for (weight, total, right, left), projection in zip(operands, rows, strict=True):
        total.addmm_(projection, left.T, alpha=-1e-9)
        weight.addmm_(right, left.T, beta=1 - 1e-6, alpha=-1e-9)


def _floor_row(
    alike: Alike, fraction: Fraction, precision: str, times: dict[str, Sequence[float]]
) -> Row:
    step, rows, products, square = (times[name] for name in _MEASURED)
    n, r = alike.size, DionConfig(rank_fraction=float(fraction)).rank(alike.size, alike.size)
    share = orthonormalize_flops(n, r) / (2 * n * r**2)
    orthonormalize = [share * milliseconds for milliseconds in square]
    floor = [a + b for a, b in zip(products, orthonormalize, strict=True)]
    to_floor = ratio(step, floor)
    return {
        "matrices": f"{alike.count} x {n}",
        "fraction": str(fraction),
        "rank": r,
        "precision": precision,
        "products_ms": summary(products).median,
        "products_gflops": 8 * n * n * r * alike.count / 1e6 / summary(products).median,
        "orthonormalize_ms": summary(orthonormalize).median,
        "step_ms": summary(step).median,
        "step_to_floor": to_floor.median,
        "low": to_floor.low,
        "high": to_floor.high,
        "rows_ms": summary(rows).median,
        "rows_to_step": ratio(rows, step).median,
    }


def _weight_rows(hidden: int, args: argparse.Namespace) -> list[Row]:
    """Returns a row for each optimizer; all of them step the same shapes in turns."""
    shape, device = gpt(hidden, args.layers), args.device
    adamw = torch.optim.AdamW(masters(shape, device), LR, weight_decay=WEIGHT_DECAY, fused=True)
    steps: dict[str, Step] = {"AdamW": adamw.step}
    if HAS_MEGATRON:
        steps[MUON] = _muon(shape, device, "medium")
        steps["Muon, fp32 products"] = _muon(shape, device, "highest")
    for fraction in reversed(args.fractions):
        steps[f"Dion {fraction}"] = _dion(shape, fraction, device, "none")
        steps[f"Dion {fraction}, residual"] = _dion(shape, fraction, device, "rows")
    times = interleaved(steps, args.repeats, device)
    rows: list[Row] = []
    for name, measured in times.items():
        to_muon = astuple(ratio(measured, times[MUON])) if MUON in times else (None, None, None)
        row: Row = {"hidden": hidden, "layers": args.layers, "optimizer": name}
        compared = zip(("to_muon", "low", "high"), to_muon, strict=True)
        rows.append({**row, "step_ms": summary(measured).median, **dict(compared)})
    return rows


def _muon(shape: GptShape, device: str, precision: str) -> Step:
    """Returns the step of Megatron's Muon; `medium`, its default, computes products in bf16.

    Megatron splits fused query, key and value, and leaves gate and up projection one matrix.
    """
    if device == "cpu":
        preload()
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.emerging_optimizers import (
        TensorParallelMuon,
        _muon_config_to_kwargs,
    )

    weights: list[Any] = masters(shape, device)
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
    return TensorParallelMuon(weights, **_muon_config_to_kwargs(config, [model], None)).step


def _dion(shape: GptShape, fraction: Fraction, device: str, residual: Any) -> Step:
    config = DionConfig(rank_fraction=float(fraction), residual=residual)
    dion = dion_on_pieces(shape, Topology(), config, device=device)
    return lambda: checked_step(dion)


if __name__ == "__main__":
    main()
