"""Runs of Megatron with Dion that keep what Dion was given, to be compared with the reference."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm.exchange import Matrix
from megatron_dion.sharding.blocks import Rectangle
from tests.distributed.tiny_gpt import TRAINING
from tests.reference import ReferenceMatrix
from tests.worlds import train, world

# The name of a matrix, rows and columns of a rectangle of it, and its values.
Frame = list[tuple[str, slice, slice, Tensor]]


def save_start(model: Sequence[str], folder: Path) -> None:
    """Saves a checkpoint to start from: pipeline stages would draw other first weights."""
    argv = "--optimizer adam --lr 1e-5 --min-lr 0 --lr-warmup-iters 0 --train-iters 1".split()
    argv += "--save-interval 1 --ckpt-format torch_dist --no-save-optim".split()
    world(1).train(*model, *TRAINING, *argv, "--save", str(folder))


def rectangles_of(optimizer: Dion) -> Iterator[tuple[Matrix, Tensor, Rectangle]]:
    """What a rank holds of all matrices: the matrix, the flat piece of a parameter, the place."""
    distribution = optimizer._distribution
    assert distribution is not None
    for step_set in optimizer.bind().sets:
        for placement, rectangle in step_set.plan.rectangles:
            matrix = step_set.plan.layout.matrices[rectangle.matrix]
            yield matrix, distribution.tensors[placement], rectangle


def frame(optimizer: Dion, gradients: bool = False) -> Frame:
    """A copy of the weights that a rank holds, or of their gradients."""
    copied: Frame = []
    for matrix, piece, r in rectangles_of(optimizer):
        tensor = piece.grad if gradients else piece
        assert tensor is not None
        values = tensor.detach().view(-1)[r.offset : r.offset + r.numel].view(r.rows, r.columns)
        rows, columns = slice(r.row_start, r.row_stop), slice(r.column_start, r.column_stop)
        copied.append((matrix.name, rows, columns, values.clone()))
    return copied


def train_recorded(argv: Sequence[str], iterations: int) -> dict[str, Any]:
    """On a rank: trains, and keeps what Dion was given and what it made of it."""
    first: dict[int, Frame] = {}
    last: dict[int, Frame] = {}
    gradients: list[Frame] = [[] for _ in range(iterations)]
    rates: list[dict[str, tuple[float, float]]] = [{} for _ in range(iterations)]
    shapes: dict[str, tuple[int, int]] = {}
    step = Dion.step

    def recorded(self: Dion, closure: None = None) -> None:
        number = self.number_of_steps
        first.setdefault(id(self), frame(self))
        gradients[number] += frame(self, gradients=True)
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for matrix, piece, _ in rectangles_of(self):
            group = groups[id(piece)]
            rates[number][matrix.name] = group["lr"], group["weight_decay"]
            shapes[matrix.name] = matrix.rows, matrix.columns
        step(self, closure)
        last[id(self)] = frame(self)

    Dion.step = recorded
    train(argv)
    return {
        "first": [placed for one in first.values() for placed in one],
        "last": [placed for one in last.values() for placed in one],
        "gradients": gradients,
        "rates": rates,
        "shapes": shapes,
    }


def assemble(frames: Sequence[Frame], shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Whole matrices from the rectangles of all ranks; copies are bitwise equal."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for one in frames:
        for name, rows, columns, values in one:
            there = whole[name][rows, columns]
            assert there.isnan().all() or torch.equal(there, values), f"copies of {name} differ"
            whole[name][rows, columns] = values
    assert all(matrix.isfinite().all() for matrix in whole.values())
    return whole


def rates_of_all(records: Sequence[dict[str, Any]], step: int) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each matrix in a step."""
    return {name: rates for record in records for name, rates in record["rates"][step].items()}


def check_against_reference(
    records: Sequence[dict[str, Any]], loose: Mapping[str, float] = {}, **options: Any
) -> None:
    """Drives the reference by the gradients that the ranks saw; compares the final weights.

    The tolerance is 1e-5, and that of `loose` for weights with its keys in their names.
    """
    shapes = {name: shape for record in records for name, shape in record["shapes"].items()}
    config = DionConfig(seed=1234, **options)  # the default of --seed
    first = assemble([record["first"] for record in records], shapes)
    matrices = {name: ReferenceMatrix.start(name, first[name], config) for name in shapes}
    for step in range(len(records[0]["gradients"])):
        gradients = assemble([record["gradients"][step] for record in records], shapes)
        rates = rates_of_all(records, step)
        for name, gradient in gradients.items():
            matrices[name].step(gradient, *rates[name], config)
    last = assemble([record["last"] for record in records], shapes)
    for name, matrix in matrices.items():
        error = (last[name].double() - matrix.weight).norm() / matrix.weight.norm()
        tolerance = max((loose[part] for part in loose if part in name), default=1e-5)
        assert error < tolerance, (name, float(error))
