"""Makes the algorithm's blocks: views of parameters, their states and the buffers of a step."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.counter_random import normal
from megatron_dion.algorithm.exchange import Matrix
from megatron_dion.algorithm.step import Block, views_in
from megatron_dion.sharding.blocks import Rectangle
from megatron_dion.sharding.collectives import (
    TORCH_DTYPES,
    Groups,
    average,
    rank_in,
    ring_bytes,
    size_of,
)
from megatron_dion.sharding.exchange import ShardedExchange
from megatron_dion.sharding.layout import Grid, Layout, Placement, Rank
from megatron_dion.sharding.matrices import compression_pays
from megatron_dion.sharding.plan import Plan, make_plan, sets_of

State = dict[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Distribution:
    """How a set of matrices lies on a grid of ranks, and what this rank holds."""

    placements: Sequence[Placement]  # all weights of the set, the same on every rank of the grid
    tensors: dict[int, Tensor]  # by index of the placement, this rank's piece, 1-D float32
    device: torch.device  # of this rank's pieces, also where it holds none
    # With compressed gradient sync, replicas hold the same pieces and have other gradients.
    groups: Groups = field(default_factory=Groups)
    gradient_scale: float = 1.0  # of the gradients of a replica, before they are averaged

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


class RightRows(NamedTuple):
    """What a rank stores of the Q of one rectangle."""

    matrix: Matrix
    rectangle: Rectangle  # its rows are those of Q
    columns: slice  # which columns of Q are stored
    values: Tensor  # (rows, stored columns), a view of the state
    is_first_of_row: bool  # whether this is the first data-parallel rank that holds these rows


class StepSet(NamedTuple):
    """What is stepped together: a rank's plan, its communication and its blocks."""

    plan: Plan
    exchange: ShardedExchange
    blocks: list[Block]


class Binding:
    """Views of parameters, states and buffers, block by block, for the active parameters.

    `state`, the optimizer's, gets `momentum` and `right_factor` of parameters that have none.
    """

    def __init__(
        self,
        active: Sequence[Tensor],
        distribution: Distribution,
        config: DionConfig,
        state: State,
    ) -> None:
        self._active = list(active)  # an id belongs to nobody else as long as these live
        self._places = _places(active)
        self._distribution = distribution
        self._state = state
        self._keeps_float32 = config.momentum_dtype == "fp32"
        self.layout = Layout(distribution.placements, distribution.grid, config)
        for index, tensor in distribution.tensors.items():
            if not state[tensor]:
                state[tensor].update(self._first_state(index, tensor))
        _join_memory(state, "momentum")
        _join_memory(state, "right_factor")
        compressed, dense = _by_gradient_sync(distribution, config)
        self._dense = [distribution.tensors[i] for i in dense if i in distribution.tensors]
        self._drifting = [distribution.tensors[i] for i in compressed if i in distribution.tensors]
        groups = distribution.groups
        # The gradients of dense weights are the same on all replicas by then.
        kinds = ((compressed, groups), (dense, replace(groups, replicas=None)))
        self.sets = [  # what is stepped together on this rank
            self._step_set(placements, sharing)
            for weights, sharing in kinds
            for placements in sets_of(
                self.layout, weights, distribution.grid.size * size_of(sharing.replicas)
            )
        ]

    def bytes_per_step(self) -> int:
        """Bytes that this rank sends to others in a step, averages of gradients included."""
        gradients = 4 * sum(parameter.numel() for parameter in self._dense)
        return ring_bytes(gradients, self._distribution.replicas) + sum(
            sum(each.exchange.bytes_sent().values()) for each in self.sets
        )

    def is_of(self, active: Sequence[Tensor]) -> bool:
        """Whether these are the bound parameters, still in the same memory."""
        return _places(active) == self._places

    def average_gradients(self) -> None:
        """Averages gradients over replicas where P and R are not averaged. A step's first call."""
        gradients = [gradient_of(parameter) for parameter in self._dense]
        average(gradients, self._distribution.groups.replicas)

    def add_gradients(self, blocks: Sequence[Block]) -> None:
        """Makes `total` of every block B = M + G.

        Where M is not stored in float32, B takes the memory of the gradient.
        """
        parameters = list({id(block.parameter): block.parameter for block in blocks}.values())
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
        for block in blocks:
            block.total = _at_the_same_place(
                gradient_of(block.parameter), block.weight, block.parameter
            )

    def recenter(self) -> None:
        """Replaces the momenta of replicas, which drift apart, by their mean. A collective call."""
        momenta = [self._state[parameter]["momentum"] for parameter in self._drifting]
        average(momenta, self._distribution.groups.replicas)

    def right_factors(self) -> Iterator[RightRows]:
        """What this rank stores of Q, rectangle by rectangle, matrix by matrix."""
        for index, tensor in self._distribution.tensors.items():
            yield from self._right_rows(index, self._state[tensor]["right_factor"])

    def _right_rows(self, placement: int, stored: Tensor) -> Iterator[RightRows]:
        layout, rank = self.layout, self._distribution.rank
        first_column = layout.placements[placement].weight.first_column(rank.tensor_parallel)
        flat, start = stored.view(-1), 0
        for rectangle in layout.rectangles(placement, rank):
            matrix = layout.matrices[rectangle.matrix]
            columns = layout.tensor_slice(placement, matrix.rank, rank)
            shape = rectangle.rows, columns.stop - columns.start
            values = flat[start : start + shape[0] * shape[1]].view(shape)
            start += values.numel()
            is_first = rectangle.column_start == first_column
            yield RightRows(matrix, rectangle, columns, values, is_first)

    def _first_state(self, placement: int, tensor: Tensor) -> dict[str, Tensor]:
        """Zero momentum, and what this rank stores of the first Q, columns of about unit norm."""
        config, rank = self.layout.config, self._distribution.rank
        factors = []
        for rectangle in self.layout.rectangles(placement, rank):
            matrix = self.layout.matrices[rectangle.matrix]
            rows = torch.arange(rectangle.row_start, rectangle.row_stop, device=tensor.device)
            values = normal(config.seed, f"{matrix.name}/right_factor", rows, matrix.rank)
            stored = self.layout.tensor_slice(placement, matrix.rank, rank)
            factors.append(values[:, stored] / matrix.rows**0.5)
        right = factors[0] if tensor.dim() == 2 else torch.cat([f.flatten() for f in factors])
        return {
            "momentum": torch.zeros_like(tensor, dtype=TORCH_DTYPES[config.momentum_dtype]),
            "right_factor": right.to(TORCH_DTYPES[config.factor_dtype]).contiguous(),
        }

    def _step_set(self, placements: Sequence[int], groups: Groups) -> StepSet:
        plan = make_plan(self.layout, self._distribution.rank, placements)
        exchange = ShardedExchange(plan, groups, self._distribution.device)
        stored = {
            placement: self._right_rows(placement, self._state[tensor]["right_factor"])
            for placement, tensor in self._distribution.tensors.items()
        }
        with exchange.allocated():  # views of its buffers can be made only then
            blocks = [
                self._block(placement, next(stored[placement]), views)
                for (placement, _), views in zip(
                    plan.rectangles, exchange.of_rectangles, strict=True
                )
            ]
            return StepSet(plan, exchange, _stacked(blocks))

    def _block(
        self,
        placement: int,
        right: RightRows,
        views: tuple[Tensor, Tensor, Tensor],
    ) -> Block:
        """The block of one rectangle."""
        left, projection, row_squares = (each.unsqueeze(0) for each in views)
        stored = right.values.unsqueeze(0)
        layout, rank, rectangle = self.layout, self._distribution.rank, right.rectangle
        tensor, matrix = self._distribution.tensors[placement], right.matrix
        is_whole = not layout.shares_rows(placement) and right.values.dtype == torch.float32
        momentum = _rectangle_view(self._state[tensor]["momentum"], rectangle)
        own_rows = layout.tensor_slice(placement, rectangle.rows, rank)
        is_duplicated = layout.placements[placement].weight.partition_dim is None
        is_copied = is_duplicated and layout.shares_rows(placement)
        return Block(
            matrices=(rectangle.matrix,),
            parameter=tensor,
            weight=_rectangle_view(tensor, rectangle),
            total=momentum,
            momentum=momentum,
            right_factor=stored if is_whole else projection,
            stored_right=stored,
            stored_columns=right.columns,
            left_factor=left,
            projection=projection,
            row_squares=row_squares,
            scale=layout.config.scale(matrix.rows, matrix.columns),
            residual_row=layout.config.residual_row(matrix.rows, matrix.columns),
            multiplied=own_rows if is_copied else slice(0, rectangle.rows),
            counted=own_rows if right.is_first_of_row else slice(0, 0),
            is_copied=is_copied,
        )


def _join_memory(state: State, name: str) -> None:
    """Makes one piece of memory of a state of all tensors, where few calls can change it."""
    states = [each for each in state.values() if each]
    tensors = [each[name] for each in states]
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) > 1:
        memory = torch.cat([tensor.flatten() for tensor in tensors])
        views = views_in(memory, [tensor.shape for tensor in tensors])
        for each, view in zip(states, views, strict=True):
            each[name] = view


def _by_gradient_sync(
    distribution: Distribution, config: DionConfig
) -> tuple[list[int], list[int]]:
    """Indices of the placements of which replicas average P and R, and of those of gradients."""
    everything = list(range(len(distribution.placements)))
    if distribution.replicas == 1:
        return everything, []
    pays = [compression_pays(p.weight.matrices(config)) for p in distribution.placements]
    return [i for i in everything if pays[i]], [i for i in everything if not pays[i]]


_STACKED = (
    *("weight", "total", "momentum", "right_factor", "stored_right", "projection"),
    "row_squares",
)


def _stacked(blocks: Sequence[Block]) -> list[Block]:
    """Stacks the rectangles into which a fused weight cuts a matrix, then those of its matrices."""
    stacks = _stack_by(blocks, _STACKED, lambda b: (b.matrices, b.left_factor.data_ptr()))
    return _stack_by(
        stacks, (*_STACKED, "left_factor"), lambda block: (block.scale, block.residual_row)
    )


def _stack_by(
    blocks: Sequence[Block], names: Sequence[str], kind: Callable[[Block], Any]
) -> list[Block]:
    """Stacks blocks of one rectangle, of the same parameter, kind and shapes."""
    groups: dict[Any, list[Block]] = defaultdict(list)
    for position, block in enumerate(blocks):
        count, rows, _ = block.weight.shape
        is_all = block.multiplied == slice(0, rows) and block.counted == slice(0, rows)
        shapes = block.weight.shape, block.left_factor.shape, block.stored_right.shape
        key = (id(block.parameter), kind(block), shapes)
        groups[key if is_all and count == 1 else position].append(block)
    stacks = [_stack(alike, names) if len(alike) > 1 else alike for alike in groups.values()]
    return [block for stack in stacks for block in stack]


def _stack(blocks: Sequence[Block], names: Sequence[str]) -> list[Block]:
    """One block of k rectangles, or one each if they are not at equal distances in memory."""
    tensors = {name: [getattr(block, name) for block in blocks] for name in names}
    distances = {name: _distances(alike) for name, alike in tensors.items()}
    if any(len(different) > 1 or min(different) < 0 for different in distances.values()):
        return list(blocks)
    stack = copy(blocks[0])
    stack.matrices = tuple(dict.fromkeys(k for block in blocks for k in block.matrices))
    joined: dict[int, Tensor] = {}  # what was one tensor stays one
    for name, (first, *_) in tensors.items():
        size, stride = (len(blocks), *first.shape[1:]), (*distances[name], *first.stride()[1:])
        view = joined.setdefault(id(first), first.as_strided(size, stride))  # (k, rows, columns)
        setattr(stack, name, view)
    return [stack]


def _distances(tensors: Sequence[Tensor]) -> set[int]:
    offsets = [int(tensor.storage_offset()) for tensor in tensors]
    return {after - before for before, after in pairwise(offsets)}


def _at_the_same_place(tensor: Tensor, view: Tensor, base: Tensor) -> Tensor:
    """The view of a contiguous tensor that has the elements which `view` has of `base`."""
    offset = view.storage_offset() - base.storage_offset() + tensor.storage_offset()
    return tensor.detach().as_strided(view.shape, view.stride(), offset)


def _places(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(parameter), parameter.data_ptr()) for parameter in parameters]


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def _rectangle_view(tensor: Tensor, rectangle: Rectangle) -> Tensor:
    """(1, rows, columns) view of a rectangle's elements in a rank's piece."""
    flat = tensor.detach().view(-1)
    part = flat[rectangle.offset : rectangle.offset + rectangle.numel]
    return part.view(1, rectangle.rows, rectangle.columns)
