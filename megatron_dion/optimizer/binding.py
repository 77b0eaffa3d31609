"""Joins parameters, states and buffers to the blocks of which the algorithm knows."""

from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_dion.algorithm import Block, DionConfig, Matrix
from megatron_dion.algorithm.counter_random import normal
from megatron_dion.sharding import (
    TORCH_DTYPES,
    Grid,
    Groups,
    Held,
    Placement,
    Plan,
    Planner,
    Rank,
    Rectangle,
    ShardedExchange,
    sets_of,
)
from megatron_dion.sharding.collectives import rank_in, size_of
from megatron_dion.sharding.replicas import average
from megatron_dion.sharding.traffic import bytes_sent, compression_pays, ring_bytes

State = dict[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Distribution:
    """How a set of matrices lies on a grid of ranks, and what this rank holds.

    Attributes:
        placements: all weights of the set, the same list on every rank of the grid.
        tensors: by index of the placement, this rank's piece, 1-D float32.
        device: where this rank's pieces are, or would be if it held any.
        groups: the ranks. Those of `groups.replicas` have other gradients, of which the mean
            counts (compressed gradient sync).
        gradient_scale: multiplies the gradients of a replica before they are averaged.
    """

    placements: Sequence[Placement]
    tensors: dict[int, Tensor]
    device: torch.device
    groups: Groups = field(default_factory=Groups)
    gradient_scale: float = 1.0

    @property
    def grid(self) -> Grid:
        return Grid(size_of(self.groups.tensor), size_of(self.groups.data))

    @property
    def rank(self) -> Rank:
        return Rank(rank_in(self.groups.tensor), rank_in(self.groups.data))

    @property
    def replicas(self) -> int:
        """Number of replicas with gradients of their own."""
        return size_of(self.groups.replicas)


@dataclass(frozen=True)
class HeldBlock:
    """A block of a matrix on this rank.

    Attributes:
        matrix: the matrix.
        rectangle: which rows and columns of it.
        parameter: the parameter of `param_groups` that holds it.
        tensors: weight, momentum and factors, of this rectangle alone: without the dimension k.
        is_first_of_row: whether no data-parallel rank before this one holds the same rows of Q.
    """

    matrix: Matrix
    rectangle: Rectangle
    parameter: Tensor
    tensors: Block
    is_first_of_row: bool


@dataclass(frozen=True)
class SteppedBlock:
    """One or more rectangles of a matrix that are stepped in the same calls.

    Attributes:
        parameter: the parameter of `param_groups` that holds them.
        tensors: weight, momentum and factors.
    """

    parameter: Tensor
    tensors: Block


@dataclass(frozen=True)
class StepSet:
    """What is stepped together.

    Attributes:
        plan: of this rank.
        exchange: with the other ranks.
        held: this rank's blocks.
        stepped: the same, with as many as possible of them in one.
        groups: these ranks; `groups.replicas` average P and R.
    """

    plan: Plan
    exchange: ShardedExchange
    held: list[HeldBlock]
    stepped: list[SteppedBlock]
    groups: Groups

    @property
    def replicas(self) -> int:
        """Number of replicas that average P and R."""
        return size_of(self.groups.replicas)


class Binding:
    """Views of parameters, states and buffers, block by block, for one set of parameters.

    Args:
        active: the parameters.
        distribution: where they are.
        config: hyperparameters.
        state: the optimizer's; gets `momentum` and `right_factor` of parameters that have none.

    Attributes:
        planner: of all ranks.
        sets: what is stepped together on this rank.
    """

    def __init__(
        self,
        active: Sequence[Tensor],
        distribution: Distribution,
        config: DionConfig,
        state: State,
    ) -> None:
        self._active = list(active)
        self._addresses = [parameter.data_ptr() for parameter in active]
        self._distribution = distribution
        self._replicas = distribution.groups.replicas
        self._state = state
        self._keeps_float32 = config.momentum_dtype == "fp32"
        compressed, dense = _by_gradient_sync(distribution, config)
        self._dense = [distribution.tensors[i] for i in dense if i in distribution.tensors]
        self._drifting = [distribution.tensors[i] for i in compressed if i in distribution.tensors]
        planner = Planner(distribution.placements, distribution.grid, config)
        ranks = distribution.grid.size * distribution.replicas
        sets = [
            *sets_of(planner, compressed, ranks, distribution.replicas),
            *sets_of(planner, dense, ranks),
        ]
        self.planner = planner.in_sets(sets)
        plans = self.planner.plans(distribution.rank)
        for index, tensor in distribution.tensors.items():
            if not state[tensor]:
                state[tensor].update(_first_state(index, tensor, plans, config))
        first_in_state: dict[int, int] = {}
        self.sets = [
            self._bind(plan, indices[0] in dense, first_in_state)
            for indices, plan in zip(sets, plans, strict=True)
        ]

    @property
    def held(self) -> list[HeldBlock]:
        return [block for chosen in self.sets for block in chosen.held]

    def bytes_per_step(self) -> int:
        """Bytes that this rank sends to others in a step, in the gradients of replicas too."""
        gradients = 4 * sum(parameter.numel() for parameter in self._dense)
        return ring_bytes(gradients, self._distribution.replicas) + sum(
            sum(bytes_sent(chosen.plan, chosen.replicas).values()) for chosen in self.sets
        )

    def is_of(self, active: Sequence[Tensor]) -> bool:
        """Whether these are the bound parameters, still in the same memory."""
        same = len(active) == len(self._active)
        return (
            same
            and all(a is b for a, b in zip(active, self._active, strict=True))
            and [parameter.data_ptr() for parameter in active] == self._addresses
        )

    def average_gradients(self) -> None:
        """Averages over replicas the gradients of weights whose P and R are not. Before any set."""
        average([gradient_of(parameter) for parameter in self._dense], self._replicas)

    def add_gradients(self, chosen: StepSet) -> None:
        """Makes `total` of every block of a set B = M + G.

        Where M is not kept in float32, B takes the memory of the gradient.
        """
        parameters = list({id(b.parameter): b.parameter for b in chosen.stepped}.values())
        if not parameters:
            return
        scale = self._distribution.gradient_scale
        momenta = [self._state[parameter]["momentum"] for parameter in parameters]
        gradients = [gradient_of(parameter) for parameter in parameters]
        if self._keeps_float32:
            torch._foreach_add_(momenta, gradients, alpha=scale)
            return
        if scale != 1:
            torch._foreach_mul_(gradients, scale)
        torch._foreach_add_(gradients, momenta)
        for block in chosen.stepped:
            block.tensors.total = _at_the_same_place(
                gradient_of(block.parameter), block.tensors.weight, block.parameter
            )

    def recenter(self) -> None:
        """Replaces the momenta of replicas, which drift apart, by their mean. A collective call."""
        momenta = [self._state[parameter]["momentum"] for parameter in self._drifting]
        average(momenta, self._replicas)

    def _bind(self, plan: Plan, is_dense: bool, first_in_state: dict[int, int]) -> StepSet:
        """A set of matrices; dense ones have the same gradients on all replicas by now."""
        groups = self._distribution.groups
        if is_dense:
            groups = replace(groups, replicas=None)
        exchange = ShardedExchange(plan, groups, self._distribution.device)
        with exchange.allocated():  # views of its buffers can be made only then
            held = [
                self._hold(block, left, projection, plan, first_in_state)
                for block, left, projection in zip(
                    plan.held, exchange.lefts, exchange.projections, strict=True
                )
            ]
            stepped = _stacked(held)
        return StepSet(plan, exchange, held, stepped, groups)

    def _hold(
        self,
        block: Held,
        left: Tensor,
        projection: Tensor,
        plan: Plan,
        first_in_state: dict[int, int],
    ) -> HeldBlock:
        distribution, layout = self._distribution, plan.layout
        rank, rectangle = distribution.rank, block.rectangle
        tensor = distribution.tensors[block.placement]
        weight = distribution.placements[block.placement].weight
        kept_columns = layout.share(block.placement, plan.matrices[block.matrix].rank, rank)
        kept_right = _take(
            self._state[tensor]["right_factor"],
            (rectangle.rows, kept_columns.stop - kept_columns.start),
            first_in_state,
            block.placement,
        )
        is_whole = not layout.shares_rows(block.placement)
        momentum = _rectangle_view(self._state[tensor]["momentum"], rectangle)
        is_first_of_row = rectangle.column_start == weight.first_column(rank.tensor_parallel)
        counted = layout.share(block.placement, rectangle.rows, rank)
        tensors = Block(
            matrix=block.matrix,
            weight=_rectangle_view(tensor, rectangle),
            total=momentum,
            momentum=momentum,
            right_factor=kept_right
            if is_whole and kept_right.dtype == torch.float32
            else projection,
            kept_right=kept_right,
            kept_columns=kept_columns,
            left_factor=left,
            projection=projection,
            multiplied=block.multiplied,
            counted=counted if is_first_of_row else slice(0, 0),
            is_copied=layout.is_duplicated(block.placement),
        )
        return HeldBlock(
            matrix=plan.matrices[block.matrix],
            rectangle=rectangle,
            parameter=tensor,
            tensors=tensors,
            is_first_of_row=is_first_of_row,
        )


def _by_gradient_sync(
    distribution: Distribution, config: DionConfig
) -> tuple[list[int], list[int]]:
    """Placements whose replicas average P and R, and those whose replicas average gradients."""
    everything = list(range(len(distribution.placements)))
    if distribution.replicas == 1:
        return everything, []
    pays = [compression_pays(p.weight.matrices(config)) for p in distribution.placements]
    return [i for i in everything if pays[i]], [i for i in everything if not pays[i]]


def _first_state(
    index: int, tensor: Tensor, plans: Sequence[Plan], config: DionConfig
) -> dict[str, Tensor]:
    """Zero momentum, and what this rank keeps of the first right factors."""
    factors = []
    for plan in plans:
        for block in plan.held:
            if block.placement == index:
                matrix, place = plan.matrices[block.matrix], block.rectangle
                rows = torch.arange(place.row_start, place.row_stop, device=tensor.device)
                values = normal(config.seed, f"{matrix.name}/right_factor", rows, matrix.rank)
                kept = plan.layout.share(index, matrix.rank, plan.rank)
                # (rows, kept columns), columns of about unit norm
                factors.append(values[:, kept] / matrix.rows**0.5)
    right = factors[0] if tensor.dim() == 2 else torch.cat([f.flatten() for f in factors])
    return {
        "momentum": torch.zeros_like(tensor, dtype=TORCH_DTYPES[config.momentum_dtype]),
        "right_factor": right.to(TORCH_DTYPES[config.factor_dtype]).contiguous(),
    }


def _take(memory: Tensor, shape: tuple[int, int], first: dict[int, int], placement: int) -> Tensor:
    """The next (rows, columns) of a weight's state."""
    start = first.get(placement, 0)
    first[placement] = start + shape[0] * shape[1]
    return memory.view(-1)[start : first[placement]].view(shape)


_STACKED = ("weight", "total", "momentum", "right_factor", "kept_right", "projection")


def _stacked(held: Sequence[HeldBlock]) -> list[SteppedBlock]:
    """Joins the rectangles into which a fused weight cuts a matrix, as far as they are alike."""
    groups: dict[Any, list[HeldBlock]] = defaultdict(list)
    for position, block in enumerate(held):
        groups[_likeness(block) or position].append(block)
    return [
        SteppedBlock(alike[0].parameter, stack)
        for alike in groups.values()
        for stack in _stacks([block.tensors for block in alike])
    ]


def _likeness(block: HeldBlock) -> Any:
    """The same for blocks that can be one; None for those of a part of whose rows others have."""
    tensors, rows = block.tensors, block.rectangle.rows
    is_all = tensors.multiplied == slice(0, rows) and tensors.counted == slice(0, rows)
    place = block.rectangle.column_start, block.rectangle.column_stop
    return (id(block.parameter), tensors.matrix, rows, place) if is_all else None


def _stacks(blocks: Sequence[Block]) -> list[Block]:
    """One block of all, or, where they do not lie at equal distances, each alone."""
    tensors = {name: [getattr(block, name) for block in blocks] for name in _STACKED}
    distances = {name: _distances(alike) for name, alike in tensors.items()}
    if any(len(found) > 1 for found in distances.values()):
        return [stack for block in blocks for stack in _stacks([block])]
    stack = copy(blocks[0])
    joined: dict[int, Tensor] = {}  # what was one tensor stays one
    for name, (first, *_) in tensors.items():
        distance = distances[name].pop() if distances[name] else first.numel()
        size, stride = (len(blocks), *first.shape), (distance, *first.stride())
        view = joined.setdefault(id(first), first.as_strided(size, stride))  # (k, rows, columns)
        setattr(stack, name, view)
    return [stack]


def _distances(tensors: Sequence[Tensor]) -> set[int]:
    offsets = [int(tensor.storage_offset()) for tensor in tensors]
    return {after - before for before, after in pairwise(offsets)}


def _at_the_same_place(tensor: Tensor, view: Tensor, base: Tensor) -> Tensor:
    """The elements of a contiguous tensor that a view has of another one of the same size."""
    offset = view.storage_offset() - base.storage_offset() + tensor.storage_offset()
    return tensor.detach().as_strided(view.shape, view.stride(), offset)


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def _rectangle_view(tensor: Tensor, rectangle: Rectangle) -> Tensor:
    """(rows, columns) view of a rectangle's elements in a rank's piece."""
    flat = tensor.detach().view(-1)
    part = flat[rectangle.offset : rectangle.offset + rectangle.numel]
    return part.view(rectangle.rows, rectangle.columns)
