"""The same run in every topology: losses, and weights against the dense float64 reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm.reference import ReferenceMatrix
from megatron_dion.optimizer.dion import HeldBlock
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses, train

ITERATIONS = 20
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-3}
TOPOLOGIES = {
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "dp2": (2, ""),
    "tp2-dp2-overlap": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --overlap-grad-reduce"
        " --overlap-param-gather --ddp-bucket-size 20000",
    ),
    "tp4": (4, "--tensor-model-parallel-size 4"),
    "dp4": (4, ""),
    "tp2-pp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    ),
}
Placed = tuple[str, slice, slice, Tensor]
Frame = list[Placed]


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


def train_recorded(argv: Sequence[str]) -> dict[str, Any]:
    """On a rank: trains, and keeps what Dion was given and what it made of it."""
    record: dict[str, Any] = {"first": None, "gradients": [], "rates": [], "last": None}
    step = Dion.step

    def recorded(self: Dion, closure: None = None) -> None:
        blocks = self.held_blocks()
        record["shapes"] = {b.matrix.name: (b.matrix.rows, b.matrix.columns) for b in blocks}
        record["first"] = record["first"] or [place(b, b.tensors.weight) for b in blocks]
        record["gradients"].append([place(b, gradient(b)) for b in blocks])
        group = self.param_groups[0]
        record["rates"].append((group["lr"], group["weight_decay"]))
        step(self, closure)
        record["last"] = [place(b, b.tensors.weight) for b in blocks]

    Dion.step = recorded
    train(argv)
    return record


def assemble(frames: Sequence[Frame], shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Whole matrices from the blocks of all ranks, which must cover them."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for frame in frames:
        for name, rows, columns, values in frame:
            whole[name][rows, columns] = values
    assert all(matrix.isfinite().all() for matrix in whole.values())
    return whole


def check_against_reference(records: Sequence[dict[str, Any]], tolerance: float) -> None:
    """Drives the reference by the gradients that the ranks saw; compares the final weights."""
    shapes = {name: shape for record in records for name, shape in record["shapes"].items()}
    config = DionConfig(seed=1234)  # the default of --seed
    first = assemble([record["first"] for record in records], shapes)
    matrices = {name: ReferenceMatrix.start(name, first[name], config) for name in shapes}
    for step in range(ITERATIONS):
        gradients = assemble([record["gradients"][step] for record in records], shapes)
        lr, weight_decay = records[0]["rates"][step]
        for name, gradient in gradients.items():
            matrices[name].step(gradient, lr, weight_decay, config)
    last = assemble([record["last"] for record in records], shapes)
    for name, matrix in matrices.items():
        error = (last[name].double() - matrix.weight).norm() / matrix.weight.norm()
        assert error < tolerance, (name, float(error))


@pytest.fixture(scope="module")
def start(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint from which all runs start: pipeline stages would draw other first weights."""
    folder = tmp_path_factory.mktemp("start")
    nursery.pretrain(
        1,
        *"--optimizer adam --lr 1e-5 --min-lr 0 --train-iters 3".split(),
        *"--save-interval 3 --ckpt-format torch_dist --no-save-optim --save".split(),
        str(folder),
    )
    return folder


def run(nursery: Nursery, start: Path, run_dir: Path, topology: str, precision: str) -> list:
    size, flags = (1, "") if topology == "single" else TOPOLOGIES[topology]
    precision_flags = [] if precision == "fp32" else ["--bf16"]
    argv = [*MODEL, *TRAINING, *DION, *flags.split(), *precision_flags]
    argv += ["--load", str(start), "--finetune", "--run-dir", str(run_dir)]
    return nursery.run(size, train_recorded, [*argv, "--train-iters", str(ITERATIONS)])


@pytest.fixture(scope="module")
def single(nursery: Nursery, start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Losses of one process in each precision."""
    found = {}
    for precision in TOLERANCE:
        run_dir = tmp_path_factory.mktemp(f"single-{precision}")
        check_against_reference(run(nursery, start, run_dir, "single", precision), 1e-5)
        found[precision] = losses(run_dir)
        assert found[precision][-1] < found[precision][0] - 0.5
    return found


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_run_does_not_depend_on_topology(
    nursery: Nursery, start: Path, single: dict, tmp_path: Path, topology: str, precision: str
) -> None:
    records = run(nursery, start, tmp_path, topology, precision)
    found = losses(tmp_path)
    assert len(found) == ITERATIONS
    differences = [abs(a - b) for a, b in zip(found, single[precision], strict=True)]
    assert max(differences) < TOLERANCE[precision], differences
    check_against_reference(records, 1e-5)
