"""The same run in every topology: losses, and weights against the dense float64 reference."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm.reference import ReferenceMatrix
from megatron_dion.optimizer.binding import HeldBlock
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses, train

ITERATIONS = 20
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-3, "fp16": 5e-3}
PRECISION = {"fp32": "", "bf16": "--bf16", "fp16": "--fp16 --initial-loss-scale 4096"}
# Every expert sees every token: a choice between experts would turn rounding into other routes.
MODELS = {
    "dense": "",
    "experts": (
        "--num-experts 4 --moe-router-topk 4 --moe-ffn-hidden-size 40"
        " --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall"
    ),
}
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000"
SINGLE = (1, "--micro-batch-size 12")
TOPOLOGIES = {
    "tp2": (2, f"{TP2} --micro-batch-size 6"),
    "dp2": (2, ""),
    "tp2-dp2-overlap": (4, f"{TP2} {OVERLAP}"),
    "tp4": (4, "--tensor-model-parallel-size 4 --micro-batch-size 6"),
    "dp4": (4, ""),
    "tp2-pp2": (4, f"{TP2} {PP2} --micro-batch-size 6"),
}
FP32_TOPOLOGIES = {
    "dp3": (3, "--micro-batch-size 2"),
    "vpp2-dp2": (4, f"{PP2} --num-layers-per-virtual-pipeline-stage 1 {OVERLAP}"),
    "cp2-dp2": (4, f"--context-parallel-size 2 {OVERLAP}"),
    "instances2-dp4": (4, "--num-distributed-optimizer-instances 2"),
}
EXPERT_TOPOLOGIES = {
    "ep2": (2, "--expert-model-parallel-size 2 --micro-batch-size 6"),
    "ep2-dp4-overlap": (4, f"--expert-model-parallel-size 2 {OVERLAP}"),
    "tp2-ep2-etp1": (4, f"{TP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "tp2-ep2-etp2": (4, f"{TP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 2"),
}
CASES = [
    *(("dense", topology, precision) for precision in ("fp32", "bf16") for topology in TOPOLOGIES),
    *(("dense", topology, "fp32") for topology in FP32_TOPOLOGIES),
    ("dense", "tp2-dp2-overlap", "fp16"),
    *(("experts", topology, "fp32") for topology in EXPERT_TOPOLOGIES),
]
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
    first: dict[int, Frame] = {}
    last: dict[int, Frame] = {}
    gradients: list[Frame] = [[] for _ in range(ITERATIONS)]
    rates: list[tuple[float, float]] = [(0.0, 0.0)] * ITERATIONS
    shapes: dict[str, tuple[int, int]] = {}
    step = Dion.step

    def recorded(self: Dion, closure: None = None) -> None:
        blocks = self.held_blocks()
        group = self.param_groups[0]
        shapes.update({b.matrix.name: (b.matrix.rows, b.matrix.columns) for b in blocks})
        first.setdefault(id(self), [place(b, b.tensors.weight) for b in blocks])
        gradients[group["step"]] += [place(b, gradient(b)) for b in blocks]
        rates[group["step"]] = (group["lr"], group["weight_decay"])
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
def starts(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints from which all runs start: pipeline stages would draw other first weights."""
    folders = {model: tmp_path_factory.mktemp(model) for model in MODELS}
    for model, folder in folders.items():
        nursery.pretrain(
            1,
            *"--optimizer adam --lr 1e-5 --min-lr 0 --lr-warmup-iters 0 --train-iters 1".split(),
            *"--save-interval 1 --ckpt-format torch_dist --no-save-optim".split(),
            *("--save", str(folder), *MODELS[model].split()),
        )
    return folders


class Runs:
    """Runs a model in a topology from its starting point, the single process once."""

    def __init__(
        self, nursery: Nursery, starts: dict[str, Path], make: pytest.TempPathFactory
    ) -> None:
        self._nursery = nursery
        self._starts = starts
        self._make = make
        self.single = cache(self._single)

    def run(
        self, model: str, topology: tuple[int, str], precision: str
    ) -> tuple[list[float], str, list[dict[str, Any]]]:
        """Losses, the routing table, and what each rank recorded."""
        size, flags = topology
        run_dir = self._make.mktemp("run")
        argv = [*MODEL, *TRAINING, *DION, *MODELS[model].split(), *flags.split()]
        argv += [*PRECISION[precision].split(), "--train-iters", str(ITERATIONS)]
        argv += ["--load", str(self._starts[model]), "--finetune", "--run-dir", str(run_dir)]
        records = self._nursery.run(size, train_recorded, argv)
        return losses(run_dir), (run_dir / "routing.tsv").read_text(), records

    def _single(self, model: str, precision: str) -> tuple[list[float], str]:
        found, routing, records = self.run(model, SINGLE, precision)
        check_against_reference(records, 1e-5)
        assert found[-1] < found[0] - 0.5
        return found, routing


@pytest.fixture(scope="module")
def runs(
    nursery: Nursery, starts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    return Runs(nursery, starts, tmp_path_factory)


@pytest.mark.parametrize(("model", "topology", "precision"), CASES)
def test_run_does_not_depend_on_topology(
    runs: Runs, model: str, topology: str, precision: str
) -> None:
    every = TOPOLOGIES | FP32_TOPOLOGIES | EXPERT_TOPOLOGIES
    found, routing, records = runs.run(model, every[topology], precision)
    expected, expected_routing = runs.single(model, precision)
    assert routing == expected_routing
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    assert max(differences) < TOLERANCE[precision], differences
    check_against_reference(records, 1e-5)
