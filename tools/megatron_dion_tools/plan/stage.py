"""A pipeline stage under an optimizer: what of the model its ranks share, and where it lies.

Line numbers are those of megatron-core 0.19.2 (MC).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.sharding.layout import LEAST_BUCKET, Placement, dion_bucket_size
from megatron_dion.sharding.matrices import Weight
from megatron_dion_tools.plan.models import GptShape
from megatron_dion_tools.plan.topology import Topology

# MC/optimizer/param_layout.py:23, :28
_START_MULTIPLE = 64
_BUCKET_MULTIPLE = 128


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of the matrices; AdamW has all the rest, over the distributed optimizer.

    Attributes:
        kind: `adamw`, `muon` (Megatron's, as `pretrain_gpt.py` makes it) or `dion`.
        dion: hyperparameters of `dion`.
        compressed_sync: of `dion`, over instances.
        muon_tp_mode: `blockwise` takes each tensor-parallel rank's part for a matrix; `duplicated`
            gathers the matrix, and each rank does the same work.
    """

    kind: str
    dion: DionConfig = field(default_factory=DionConfig)
    compressed_sync: bool = False
    muon_tp_mode: str = "blockwise"

    @property
    def label(self) -> str:
        """Its name in tables."""
        names = {"dion": f"dion {self.dion.rank_fraction:g}", "muon": f"muon {self.muon_tp_mode}"}
        return names.get(self.kind, self.kind) + " compressed" * self.compressed_sync


@dataclass(frozen=True)
class Run:
    """What is planned.

    Attributes:
        shape: the model.
        topology: the ranks.
        optimizer: of the matrices.
        bucket_size: elements of a bucket, None for what a run takes by itself, 0 for one bucket
            per stage, as without `--overlap-grad-reduce`.
        weight_bytes: of a number of the model's weights: 2 for bf16, 4 for fp32.
        micro_batch: sequences.
        global_batch: sequences of a step over all ranks.
        recompute: `none`, `selective` (attention) or `full` recomputation of activations.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """

    shape: GptShape
    topology: Topology
    optimizer: Optimizer
    bucket_size: int | None = None
    weight_bytes: int = 2
    micro_batch: int = 1
    global_batch: int = 1
    recompute: str = "selective"

    def __post_init__(self) -> None:
        samples = self.micro_batch * self.topology.dp
        if self.global_batch % samples:
            raise ValueError(
                f"--global-batch-size {self.global_batch} is no multiple of --micro-batch-size"
                f" {self.micro_batch} x --dp {self.topology.dp}:"
                f" take {-(-self.global_batch // samples) * samples}, or another --dp"
            )

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step on each rank."""
        return self.global_batch // (self.micro_batch * self.topology.dp)


class Stage:
    """A pipeline stage of a run.

    Attributes:
        layers: their global numbers.
        weights: the optimizer's matrices on a rank.
        matrices: their elements.
        others: elements of all other parameters.
        group: the data-parallel ranks.
        bucket_size: elements at which a bucket of matrices is full, None for one bucket.

    Raises:
        ValueError: Megatron could not divide the model in this way.
    """

    def __init__(self, run: Run, index: int) -> None:
        shape, topology = run.shape, run.topology
        self.run, self.index = run, index
        if run.optimizer.kind == "muon" and topology.instances > 1:
            raise ValueError(
                f"--instances {topology.instances}: Megatron's Muon refuses them: take 1, or leave"
                " muon out of --optimizer"
            )
        self.layers = shape.stage_layers(topology.pp, index)
        self.is_first, self.is_last = index == 0, index == topology.pp - 1
        self.weights = shape.weights(self.layers, topology.tp)
        self.matrices = sum(map(numel_of, self.weights))
        self.others = shape.other_elements(self.layers, topology.tp)
        self.group = topology.group("data")
        self.bucket_size = default_bucket_size(topology.replicated, index)
        if self.bucket_size and run.optimizer.kind == "dion":
            self.bucket_size = dion_bucket_size(self.matrices, self.bucket_size)
        if run.bucket_size is not None and self.is_first:
            self.bucket_size = run.bucket_size or None

    @property
    def numel(self) -> int:
        """Elements of all parameters of a rank."""
        return self.matrices + self.others


def numel_of(weight: Weight) -> int:
    """Elements of a weight on a rank."""
    return weight.rows * weight.columns


def default_bucket_size(data_parallel_size: int, pipeline_stage: int = 0) -> int | None:
    """Megatron's bucket size, in elements, with `--overlap-grad-reduce` and no size of its own.

    Without that flag Megatron makes one bucket (None), and in any case in pipeline stages after
    the first (MC/distributed/distributed_data_parallel.py:68, :105). The data-parallel size is that
    of all instances together, with context-parallel ranks.
    """
    return max(LEAST_BUCKET, 1_000_000 * data_parallel_size) if pipeline_stage == 0 else None


def place(
    weights: Sequence[Weight], data_parallel_size: int, bucket_size: int | None
) -> list[Placement]:
    """Where Megatron puts Dion's weights, which have a flat buffer to themselves.

    As `DistributedOptimizer._compute_per_buffer_param_layout` does without
    `--ddp-pad-buckets-for-high-nccl-busbw` (MC/optimizer/distrib_optimizer.py:506).

    Args:
        weights: as `GptShape.weights` gives them; the last one comes first in the result.
        data_parallel_size: data-parallel x context-parallel ranks of one instance.
        bucket_size: elements at which a bucket is full, None for one bucket.
    """
    placements: list[Placement] = []
    bucket: list[tuple[Weight, int]] = []
    end, multiple = 0, math.lcm(data_parallel_size, _BUCKET_MULTIPLE)
    for number, weight in enumerate(reversed(weights), 1):
        start = -(-end // _START_MULTIPLE) * _START_MULTIPLE
        bucket.append((weight, start))
        end = start + numel_of(weight)
        if number == len(weights) or (bucket_size is not None and end >= bucket_size):
            numel = -(-end // multiple) * multiple
            placements += [Placement(weight, start, numel) for weight, start in bucket]
            bucket, end = [], 0
    return placements
