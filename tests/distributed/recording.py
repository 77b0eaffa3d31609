"""Runs of Megatron with Dion that keep what Dion was given, to be compared with the reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm.reference import ReferenceMatrix
from megatron_dion.optimizer.binding import HeldBlock
from tests.distributed.nursery import TRAINING, Nursery, train

Placed = tuple[str, slice, slice, Tensor]
Frame = list[Placed]


def save_start(nursery: Nursery, model: Sequence[str], folder: Path) -> None:
    """Saves a checkpoint to start from: pipeline stages would draw other first weights."""
    argv = "--optimizer adam --lr 1e-5 --min-lr 0 --lr-warmup-iters 0 --train-iters 1".split()
    argv += "--save-interval 1 --ckpt-format torch_dist --no-save-optim".split()
    nursery.run(1, train, [*model, *TRAINING, *argv, "--save", str(folder)])


def place(block: HeldBlock, values: Tensor) -> Placed:
    """Values of a block with their place in their matrix."""
    r = block.rectangle
    rows, columns = slice(r.row_start, r.row_stop), slice(r.column_start, r.column_stop)
    return block.matrix.name, rows, columns, values.clone()


def gradient(block: HeldBlock) -> Tensor:
    """The block of the gradient that Megatron gave to Dion."""
    r = block.rectangle
    assert block.parameter.grad is not None
    return block.parameter.grad[r.offset : r.offset + r.numel].view(r.rows, r.columns)


def rates_of(optimizer: Dion, block: HeldBlock) -> tuple[float, float]:
    """Learning rate and weight decay of the group of a block's parameter."""
    for group in optimizer.param_groups:
        if any(parameter is block.parameter for parameter in group["params"]):
            return group["lr"], group["weight_decay"]
    raise AssertionError(f"{block.matrix.name} is in no group")


def train_recorded(argv: Sequence[str], iterations: int) -> dict[str, Any]:
    """On a rank: trains, and keeps what Dion was given and what it made of it."""
    first: dict[int, Frame] = {}
    last: dict[int, Frame] = {}
    gradients: list[Frame] = [[] for _ in range(iterations)]
    rates: list[dict[str, tuple[float, float]]] = [{} for _ in range(iterations)]
    shapes: dict[str, tuple[int, int]] = {}
    step = Dion.step

    def recorded(self: Dion, closure: None = None) -> None:
        blocks = self.held_blocks()
        number = self.param_groups[0]["step"]
        shapes.update({b.matrix.name: (b.matrix.rows, b.matrix.columns) for b in blocks})
        first.setdefault(id(self), [place(b, b.tensors.weight) for b in blocks])
        gradients[number] += [place(b, gradient(b)) for b in blocks]
        rates[number].update({b.matrix.name: rates_of(self, b) for b in blocks})
        step(self, closure)
        last[id(self)] = [place(b, b.tensors.weight) for b in blocks]

    Dion.step = recorded
    train(argv)
    return {
        "first": [placed for frame in first.values() for placed in frame],
        "last": [placed for frame in last.values() for placed in frame],
        "gradients": gradients,
        "rates": rates,
        "shapes": shapes,
    }


def assemble(frames: Sequence[Frame], shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Whole matrices from the blocks of all ranks, which cover them; copies are bitwise equal."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for frame in frames:
        for name, rows, columns, values in frame:
            held = whole[name][rows, columns]
            assert held.isnan().all() or torch.equal(held, values), f"copies of {name} differ"
            whole[name][rows, columns] = values
    assert all(matrix.isfinite().all() for matrix in whole.values())
    return whole


def rates_of_all(records: Sequence[dict[str, Any]], step: int) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each matrix in a step."""
    return {name: rates for record in records for name, rates in record["rates"][step].items()}


def check_against_reference(
    records: Sequence[dict[str, Any]], tolerance: float, **options: Any
) -> None:
    """Drives the reference by the gradients that the ranks saw; compares the final weights."""
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
        assert error < tolerance, (name, float(error))
