"""A pipeline stage under an optimizer: its parameters in buffers, and Dion's plans."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dion.algorithm import DionConfig
from megatron_dion.sharding import Grid, Placement, Planner, sets_of
from megatron_dion.sharding.traffic import compression_pays
from megatron_dion_tools.plan.divisors import check_divides
from megatron_dion_tools.plan.holdings import Counts, pieces
from megatron_dion_tools.plan.layout import (
    Buffer,
    default_bucket_size,
    layer_wise_buffer,
    plain_buffer,
    stock_buffer,
)
from megatron_dion_tools.plan.models import GptShape, Parameter
from megatron_dion_tools.plan.topology import Group, Topology

MUON_TP_MODES = ("blockwise", "duplicated")


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of the matrices; AdamW has all the rest, over the distributed optimizer.

    Attributes:
        kind: `adamw`, `muon` (Megatron's, layer-wise distributed) or `dion`.
        dion: hyperparameters of `dion`.
        compressed_sync: of `dion`, over instances.
        muon_tp_mode: how `muon` treats a matrix that tensor-parallel ranks share: `blockwise` takes
            each rank's part for a matrix, `duplicated` gathers the matrix and does the same work on
            each rank.
        muon_steps: Newton-Schulz iterations.
        layer_wise_layout: whether `muon` pads a buffer so that each rank's share is as large as
            the largest (the default), or, with `--no-use-layer-wise-param-layout`, reduces whole
            gradients on all ranks.
    """

    kind: str
    dion: DionConfig = field(default_factory=DionConfig)
    compressed_sync: bool = False
    muon_tp_mode: str = "blockwise"
    muon_steps: int = 5
    layer_wise_layout: bool = True

    @property
    def precision(self) -> str:
        """Of the products, one of `algorithm.PRECISIONS`; Megatron's default for Muon."""
        return self.dion.fp32_matmul_prec if self.kind == "dion" else "medium"

    @property
    def label(self) -> str:
        if self.kind == "dion":
            return f"dion {self.dion.rank_fraction:g}"
        if self.kind == "muon":
            layout = "" if self.layer_wise_layout else ", no layout"
            return f"muon {self.muon_tp_mode}{layout}"
        return self.kind


@dataclass(frozen=True)
class Run:
    """What is planned.

    Attributes:
        shape: the model.
        topology: the ranks.
        optimizer: of the matrices.
        bucket_size: elements, None for Megatron's default (`default_bucket_size`), 0 for one bucket
            per stage (a run without `--overlap-grad-reduce`).
        weight_bytes: of a number of the model's weights: 2 for bf16, 4 for fp32.
    """

    shape: GptShape
    topology: Topology
    optimizer: Optimizer
    bucket_size: int | None = None
    weight_bytes: int = 2


@dataclass(frozen=True)
class Section:
    """Parameters that share a buffer.

    Attributes:
        buffer: their buffer.
        is_matrices: whether they are the optimizer's matrices, and not AdamW's.
        is_experts: whether they lie on the expert-data-parallel grid.
        group: the ranks over which the buffer is cut.
        is_reduced_whole: whether every rank has the whole gradient.
    """

    buffer: Buffer[Parameter]
    is_matrices: bool
    is_experts: bool
    group: Group
    is_reduced_whole: bool = False

    def held(self, wanted: Callable[[Parameter], bool]) -> Counts:
        """Elements of the wanted parameters that each rank's optimizer has: (ranks,)."""
        ranks = self.buffer.ranks
        total = np.zeros(ranks, np.int64)
        if self.is_reduced_whole:
            for parameter, owner in self.owners():
                total[owner] += parameter.numel if wanted(parameter) else 0
            return total
        for slot in self.buffer.slots:
            if wanted(slot.parameter):
                first, last = pieces(slot.start, slot.numel, slot.bucket_numel, ranks)
                total += last - first
        return total

    def owners(self) -> Iterator[tuple[Parameter, int]]:
        """Of a buffer of whole parameters each one, and the rank whose optimizer has it.

        Without a layout of their own they are dealt out, the smallest first, to the first rank up
        to the last and from the last down to the first (MC/optimizer/layer_wise_optimizer.py:651).
        """
        ranks = self.buffer.ranks
        if not self.is_reduced_whole:
            for slot in self.buffer.slots:
                yield slot.parameter, slot.start // (slot.bucket_numel // ranks)
            return
        slots = sorted(self.buffer.slots, key=lambda slot: slot.numel)
        for number, slot in enumerate(slots):
            place = number % (2 * ranks)
            yield slot.parameter, min(place, 2 * ranks - 1 - place)


@dataclass(frozen=True)
class DionPart:
    """A Dion optimizer of the stage: of dense weights, or of experts.

    Attributes:
        planner: of its ranks.
        is_experts: which.
        group: its data-parallel ranks.
        replicas: for each of the planner's sets how many instances average P and R.
    """

    planner: Planner
    is_experts: bool
    group: Group
    replicas: tuple[int, ...]

    @property
    def averaged(self) -> set[int]:
        """Placements of which instances average P and R, and not gradients."""
        sets = zip(self.planner.sets, self.replicas, strict=True)
        return {index for members, count in sets if count > 1 for index in members}


class Stage:
    """A pipeline stage of a run.

    Args:
        run: the run.
        index: number of the stage.

    Raises:
        ValueError: Megatron could not divide the model in this way.
    """

    def __init__(self, run: Run, index: int) -> None:
        shape, topology = run.shape, run.topology
        self.run, self.index = run, index
        experts = shape.experts
        if experts is None and topology.ep > 1:
            raise ValueError(f"--ep {topology.ep}: the model has no experts: take 1")
        if experts is not None:
            check_divides("--ep", topology.ep, experts.count, f"its {experts.count} experts")
        if run.optimizer.kind == "muon" and topology.instances > 1:
            raise ValueError(
                f"--instances {topology.instances}: Megatron's Muon refuses them: take 1, or leave"
                " muon out of --optimizer"
            )
        self.layers = shape.stage_layers(topology.pp, index, topology.account_for_ends)
        self.parameters = shape.stage(self.layers, topology.tp, (0, topology.ep))

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.run.topology.pp - 1

    @property
    def bucket_size(self) -> int | None:
        """Elements at which a bucket of this stage is full."""
        if self.run.bucket_size is None:
            return default_bucket_size(self.run.topology.replicated, self.index)
        return self.run.bucket_size or None if self.is_first else None

    @cached_property
    def sections(self) -> list[Section]:
        """The buffers, as DDP makes them."""
        found = []
        for is_experts in (False, True):
            for is_matrices in (True, False):
                chosen = [
                    p
                    for p in self.parameters
                    if p.is_expert == is_experts and self.is_matrix(p) == is_matrices
                ]
                if chosen:
                    found.append(self._section(chosen, is_matrices, is_experts))
        return found if self.run.optimizer.kind == "dion" or self._pads else self._together()

    @cached_property
    def dion_parts(self) -> list[DionPart]:
        """Dion's optimizers; none of another kind."""
        if self.run.optimizer.kind != "dion":
            return []
        return [self._dion_part(section) for section in self.sections if section.is_matrices]

    def is_matrix(self, parameter: Parameter) -> bool:
        """Whether the optimizer has the parameter; Muon takes all 2-D ones but the vocabulary."""
        if self.run.optimizer.kind == "dion":
            return parameter.weight is not None
        return len(parameter.shape) == 2 and not parameter.is_vocabulary

    @property
    def _pads(self) -> bool:
        optimizer = self.run.optimizer
        return optimizer.kind == "muon" and optimizer.layer_wise_layout

    def _section(
        self, parameters: Sequence[Parameter], is_matrices: bool, is_experts: bool
    ) -> Section:
        group = self.run.topology.data(is_experts)
        make = layer_wise_buffer if is_matrices and self._pads else stock_buffer
        buffer = make(parameters, group.size, self.bucket_size)
        return Section(buffer, is_matrices, is_experts, group)

    def _together(self) -> list[Section]:
        """AdamW, and Muon without its layout, have one buffer for matrices and all others."""
        found = []
        is_muon = self.run.optimizer.kind == "muon"
        for is_experts in (False, True):
            chosen = [p for p in self.parameters if p.is_expert == is_experts]
            if chosen:
                group = self.run.topology.data(is_experts)
                make = plain_buffer if is_muon else stock_buffer
                buffer = make(chosen, group.size, self.bucket_size)
                found.append(Section(buffer, is_muon, is_experts, group, is_muon))
        return found

    def _dion_part(self, section: Section) -> DionPart:
        config, topology = self.run.optimizer.dion, self.run.topology
        placements = [
            Placement(slot.parameter.weight, slot.start, slot.bucket_numel)
            for slot in section.buffer.slots
            if slot.parameter.weight is not None
        ]
        grid = Grid(topology.tp, section.group.size)
        replicas = topology.instances if self.run.optimizer.compressed_sync else 1
        averaged = [
            replicas > 1 and compression_pays(placement.weight.matrices(config))
            for placement in placements
        ]
        planner = Planner(placements, grid, config)
        sets, counts = [], []
        for count, chosen in (
            (replicas, [i for i, found in enumerate(averaged) if found]),
            (1, [i for i, found in enumerate(averaged) if not found]),
        ):
            dealt = sets_of(planner, chosen, grid.size * replicas, count)
            sets += dealt
            counts += [count] * len(dealt)
        planner = planner.in_sets(sets)
        return DionPart(planner, section.is_experts, section.group, tuple(counts))


def of_all(counts: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Figures of expert-data-parallel ranks (E, T), or alike on tensor ranks, on all ranks (D, T).

    With Megatron's order, an expert-data-parallel rank is as many consecutive data-parallel ones as
    there are expert-parallel ranks.
    """
    return np.broadcast_to(np.repeat(counts, shape[0] // len(counts), axis=0), shape)
