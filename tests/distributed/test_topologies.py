"""The same run in every topology: losses, and weights against the dense float64 reference."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses
from tests.distributed.recording import check_against_reference, save_start, train_recorded

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


@pytest.fixture(scope="module")
def starts(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints from which all runs start: pipeline stages would draw other first weights."""
    folders = {model: tmp_path_factory.mktemp(model) for model in MODELS}
    for model, folder in folders.items():
        save_start(nursery, [*MODEL, *MODELS[model].split()], folder)
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
        records = self._nursery.run(size, train_recorded, argv, ITERATIONS)
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
