"""The same run in every topology: losses, and weights against the dense float64 reference."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses
from tests.distributed.recording import check_against_reference, save_start, train_recorded

ITERATIONS = 10
COMMON = [*MODEL, *"--seq-length 16 --max-position-embeddings 16".split()]
GROUPS3 = "--num-layers 2 --num-attention-heads 6 --num-query-groups 3 --kv-channels 12"
GROUPS2 = "--num-layers 2 --num-attention-heads 6 --num-query-groups 2 --kv-channels 12"
# Every expert sees every token: a choice between experts would turn rounding into other routes.
EXPERTS = (
    f"{GROUPS2} --num-experts 4 --moe-router-topk 4 --moe-router-load-balancing-type none"
    " --moe-token-dispatcher-type alltoall --moe-ffn-hidden-size"
)
MODELS = {
    "groups3": GROUPS3,
    "groups2": GROUPS2,
    "heads4": "--num-layers 2 --num-attention-heads 4 --num-query-groups 2 --kv-channels 18",
    "layers4": GROUPS3.replace("layers 2", "layers 4"),
    "experts": f"{EXPERTS} 40",
    "small-experts": f"{EXPERTS} 8",
}
PRECISION = {
    "fp32": "",
    "bf16": "--bf16",
    "fp16": "--fp16 --initial-loss-scale 4096 --loss-scale-window 4",
}
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-3, "fp16": 5e-3}

TP2 = "--tensor-model-parallel-size 2"
TP4 = "--tensor-model-parallel-size 4"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
SP = "--sequence-parallel"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000"
INSTANCES = "--num-distributed-optimizer-instances 2"
TP2_DP2 = f"{TP2} {SP} {OVERLAP}"


class Case(NamedTuple):
    """A model on a grid; with `micro`, the samples of a rank at a time, of 12."""

    model: str
    ranks: int
    flags: str
    micro: int
    precision: str = "fp32"


CASES = {
    "dp2": Case("groups3", 2, "", 3),
    "dp4": Case("groups3", 4, OVERLAP, 3),
    "tp2": Case("groups2", 2, f"{TP2} {SP}", 6),
    "tp2-dp2": Case("groups2", 4, TP2_DP2, 6),
    "tp2-dp4": Case("groups2", 8, TP2, 3),
    "tp4": Case("heads4", 4, TP4, 12),
    "tp4-dp2": Case("heads4", 8, f"{TP4} {SP}", 6),
    "pp2": Case("groups3", 2, PP2, 6),
    "pp2-dp2": Case("groups3", 4, f"{PP2} {OVERLAP}", 2),
    "pp2-dp4": Case("groups3", 8, PP2, 3),
    "tp2-pp2": Case("groups2", 4, f"{TP2} {PP2} {SP}", 6),
    "tp2-pp2-dp2": Case("groups2", 8, f"{TP2} {PP2}", 6),
    "tp4-pp2": Case("heads4", 8, f"{TP4} {PP2}", 12),
    "vpp2-dp2": Case("layers4", 4, f"{PP2} --num-layers-per-virtual-pipeline-stage 1 {OVERLAP}", 3),
    "cp2-dp2": Case("groups3", 4, f"--context-parallel-size 2 {OVERLAP}", 6),
    "dp3": Case("groups3", 3, "", 2),
    "instances2-dp4": Case("groups3", 4, INSTANCES, 3),
    "instances2-tp2": Case("groups2", 4, f"{TP2} {SP} {INSTANCES} {OVERLAP}", 6),
    "ep2": Case("experts", 2, EP2, 6),
    "ep2-tp2-etp1": Case("experts", 4, f"{TP2} {SP} {EP2} --expert-tensor-parallel-size 1", 6),
    "ep2-tp2-etp2": Case("experts", 4, f"{TP2} {SP} {EP2} --expert-tensor-parallel-size 2", 6),
    "ep2-dp4-small": Case("small-experts", 4, f"{EP2} {OVERLAP}", 3),
    "bf16-dp4": Case("groups2", 4, OVERLAP, 3, "bf16"),
    "bf16-tp2": Case("groups2", 2, TP2, 12, "bf16"),
    "bf16-tp2-dp2": Case("groups2", 4, f"{TP2} {SP}", 3, "bf16"),
    "bf16-tp2-pp2": Case("groups2", 4, f"{TP2} {PP2} {SP} {OVERLAP}", 6, "bf16"),
    "fp16-tp2-dp2": Case("groups2", 4, TP2_DP2, 6, "fp16"),
}

# Flags of Dion, and what they are in the reference's hyperparameters.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "orth": ("--dion-right-factor orth", {"right_factor": "orth"}),
    "cqr": ("--dion-orthonormalizer cqr", {}),
    "qr": ("--dion-orthonormalizer qr", {}),
    "full-rank": ("--dion-rank-fraction 1", {"rank_fraction": 1.0}),
    "rank1": ("--dion-rank-fraction 0.01", {"rank_fraction": 0.01}),
    "heads": ("--dion-split gate,heads", {}),
    "whole": ("--dion-split none", {}),
    "lion": ("--dion-scalar-optimizer lion --dion-scalar-lr-mult 0.1", {}),
}
# With all directions, those with hardly any gradient are orthonormalized out of their rounding.
REFERENCE_TOLERANCE = {"full-rank": 3e-5}
Result = tuple[list[float], str, list[dict[str, Any]]]


class Runs:
    """Runs models from starting points that all their topologies share."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self._nursery = nursery
        self._folder = folder
        self._start = cache(self._save_start)
        self.single = cache(self._single)

    def run(self, case: Case, flags: str = "") -> Result:
        """Losses, the routing table, and what each rank recorded."""
        run_dir = self._folder / f"run-{len(list(self._folder.iterdir()))}"
        argv = [*COMMON, *TRAINING, *DION, *MODELS[case.model].split(), *case.flags.split()]
        argv += [*PRECISION[case.precision].split(), *flags.split()]
        argv += ["--micro-batch-size", str(case.micro), "--train-iters", str(ITERATIONS)]
        argv += ["--load", str(self._start(case.model)), "--finetune", "--run-dir", str(run_dir)]
        records = self._nursery.run(case.ranks, train_recorded, argv, ITERATIONS)
        return losses(run_dir), (run_dir / "routing.tsv").read_text(), records

    def _save_start(self, model: str) -> Path:
        """Pipeline stages would draw other first weights."""
        folder = self._folder / model
        save_start(self._nursery, [*COMMON, *MODELS[model].split()], folder)
        return folder

    def _single(self, model: str, precision: str, option: str = "") -> Result:
        """A run in one process, which has to be right, and to learn."""
        flags, hyperparameters = OPTIONS[option] if option else ("", {})
        result = self.run(Case(model, 1, "", 12, precision), flags)
        tolerance = REFERENCE_TOLERANCE.get(option, 1e-5)
        check_against_reference(result[2], tolerance, **hyperparameters)
        assert result[0][-1] < result[0][0] - 0.3
        return result


@pytest.fixture(scope="module")
def runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(nursery, tmp_path_factory.mktemp("topologies"))


def largest_difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_run_does_not_depend_on_topology(runs: Runs, name: str) -> None:
    case = CASES[name]
    found, routing, records = runs.run(case)
    expected, expected_routing, _ = runs.single(case.model, case.precision)
    assert routing == expected_routing
    assert largest_difference(found, expected) < TOLERANCE[case.precision]
    check_against_reference(records, 1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_do_not_depend_on_topology(runs: Runs, option: str) -> None:
    flags, hyperparameters = OPTIONS[option]
    found, routing, records = runs.run(CASES["tp2-dp2"], flags)
    expected, expected_routing, _ = runs.single("groups2", "fp32", option)
    assert routing == expected_routing
    assert largest_difference(found, expected) < TOLERANCE["fp32"]
    check_against_reference(records, REFERENCE_TOLERANCE.get(option, 1e-5), **hyperparameters)


def test_storage_and_exchange_in_bf16_stay_close(runs: Runs) -> None:
    names = ("comm", "momentum", "factor")
    flags = " ".join(f"--dion-{name}-dtype bf16" for name in names)
    found, routing, _ = runs.run(CASES["tp2-dp2"], flags)
    expected, expected_routing, _ = runs.single("groups2", "fp32")
    assert routing == expected_routing
    assert 2e-5 < largest_difference(found, expected) < 1e-2
