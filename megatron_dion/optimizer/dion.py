"""Dion as a torch optimizer, for whole 2-D parameters or for a rank's flat pieces of them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm import Block, DionConfig, Matrix, dion_step
from megatron_dion.algorithm.counter_random import normal
from megatron_dion.sharding import (
    Grid,
    Placement,
    Plan,
    Rank,
    Rectangle,
    ShardedExchange,
    Weight,
    make_plan,
)

_DEFAULTS = DionConfig()


@dataclass(frozen=True)
class Distribution:
    """How a set of matrices lies on a grid of ranks, and what this rank holds.

    Attributes:
        placements: all weights of the set, the same list on every rank of the grid.
        tensors: by index of the placement, this rank's piece, 1-D float32.
        device: where this rank's pieces are, or would be if it held any.
        tensor_group: tensor-parallel group; None for a single rank.
        data_group: data-parallel group; None for a single rank.
    """

    placements: Sequence[Placement]
    tensors: dict[int, Tensor]
    device: torch.device
    tensor_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None

    def plan(self, config: DionConfig) -> Plan:
        """This rank's plan."""
        return make_plan(self.placements, self.grid, self.rank, config)

    @property
    def grid(self) -> Grid:
        return Grid(*(1 if group is None else group.size() for group in self._groups))

    @property
    def rank(self) -> Rank:
        return Rank(*(0 if group is None else group.rank() for group in self._groups))

    @property
    def _groups(self) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        return self.tensor_group, self.data_group


@dataclass(frozen=True)
class HeldBlock:
    """A block of a matrix on this rank.

    Attributes:
        matrix: the matrix.
        rectangle: which rows and columns of it.
        parameter: the parameter of `param_groups` that holds it.
        tensors: weight, momentum and factors.
        is_first_copy: whether no rank before this one holds the same elements.
    """

    matrix: Matrix
    rectangle: Rectangle
    parameter: Tensor
    tensors: Block
    is_first_copy: bool


class Dion(torch.optim.Optimizer):
    """Distributed Orthonormalized Updates (arXiv 2504.05295).

    Updates 2-D float32 parameters, each as one matrix (output x input). The state of a parameter
    (m, n) is `momentum` (m, n) and `right_factor` (m, r), where
    r = min(m, n, K ceil(rank_fraction min(m, n) / K)).

    Args:
        params: parameters, (name, parameter) pairs, or groups of them. Names seed the random
            numbers; a parameter without a name is called by its position.
        lr: learning rate, before it is scaled by shape.
        momentum: error-feedback coefficient mu.
        weight_decay: decoupled, multiplied by the unscaled learning rate.
        rank_fraction: rank of the update as a share of the smaller side.
        rank_multiple_of: K, ranks are rounded up to a multiple of it.
        scale_mode: `dion` sqrt(m / n), `spectral` 0.2 sqrt(max(m, n)), `unit_rms_norm` sqrt(m / n).
        extra_scale_factor: multiplies the scale.
        orthonormalizer: `rcqr`, `cqr` or `qr`.
        oversample: rows of the sketch of `rcqr` per column.
        eps: added to column norms.
        seed: of the right factors' first values and the sketches.

    Raises:
        ValueError: a hyperparameter is out of range. `init_state` and the first `step` raise it for
            a parameter that is not a 2-D float32 matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = _DEFAULTS.momentum,
        weight_decay: float = 0.0,
        rank_fraction: float = _DEFAULTS.rank_fraction,
        rank_multiple_of: int = _DEFAULTS.rank_multiple_of,
        scale_mode: str = _DEFAULTS.scale_mode,
        extra_scale_factor: float = _DEFAULTS.extra_scale_factor,
        orthonormalizer: str = _DEFAULTS.orthonormalizer,
        oversample: float = _DEFAULTS.oversample,
        eps: float = _DEFAULTS.eps,
        seed: int = _DEFAULTS.seed,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        self.config = DionConfig(
            momentum=momentum,
            rank_fraction=rank_fraction,
            rank_multiple_of=rank_multiple_of,
            scale_mode=scale_mode,
            extra_scale_factor=extra_scale_factor,
            orthonormalizer=orthonormalizer,
            oversample=oversample,
            eps=eps,
            seed=seed,
        )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self._distribution: Distribution | None = None
        self._binding: _Binding | None = None

    def distribute(self, distribution: Distribution) -> None:
        """From now on updates the given pieces; they are the parameters of `param_groups`."""
        self._distribution = distribution
        self._binding = None

    def init_state(self) -> None:
        """Allocates momentum and right factors of all parameters that have none yet."""
        self._bind(self._parameters())

    @property
    def bytes_per_step(self) -> int:
        """Bytes that this rank sends to others in a step."""
        return self._bind(self._parameters()).exchange.bytes_per_step

    def held_blocks(self) -> list[HeldBlock]:
        """Every block on this rank, with its state."""
        return self._bind(self._parameters()).held

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have gradients.

        Raises:
            FloatingPointError: a gradient is not finite; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if self._distribution is None:
            self.check_gradients()
        elif len(active) < len(self._parameters()):
            raise RuntimeError("a piece of a distributed matrix has no gradient")
        binding = self._bind(active)
        number = self._count_step()
        if active:
            momenta = [self.state[parameter]["momentum"] for parameter in active]
            torch._foreach_add_(momenta, [_gradient(parameter) for parameter in active])
        groups = self._group_of()
        with _full_float32_products():
            dion_step(
                binding.plan.matrices,
                [block.tensors for block in binding.held],
                binding.exchange,
                self.config,
                number,
                [groups[id(block.parameter)]["lr"] for block in binding.held],
                [groups[id(block.parameter)]["weight_decay"] for block in binding.held],
            )
        return loss

    def check_gradients(self) -> None:
        """Raises FloatingPointError, naming the parameters, if a gradient is not finite."""
        parameters = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if not parameters:
            return
        # The norm is one fast pass; it is not finite either where a square overflows.
        norms = torch.stack(torch._foreach_norm([_gradient(p) for p in parameters]))
        if norms.isfinite().all():
            return
        broken = [p for p in parameters if not _gradient(p).isfinite().all()]
        if broken:
            names = ", ".join(self._name(parameter) for parameter in broken)
            raise FloatingPointError(f"gradient is not finite: {names}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group has a learning rate and a weight decay of its own, no other options.

        Raises:
            ValueError: the group has another of Dion's hyperparameters, which would be ignored.
        """
        ignored = [name for name in asdict(self.config) if name in param_group]
        if ignored:
            raise ValueError(
                f"a parameter group cannot have its own {', '.join(ignored)}:"
                " use another Dion optimizer for these parameters"
            )
        super().add_param_group(param_group)
        self._binding = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: the state is of other shapes, say of another rank fraction; nothing has
                changed.
        """
        if state_dict["state"]:
            self.init_state()
        now = super().state_dict()
        for index, tensors in state_dict["state"].items():
            for name, tensor in tensors.items():
                here = now["state"][index][name].shape if index in now["state"] else None
                if tensor.shape != here:
                    raise ValueError(
                        f"the saved {name} of parameter {index} is {tuple(tensor.shape)}, here it"
                        f" is {here and tuple(here)}: was it saved with another rank_fraction?"
                    )
        super().load_state_dict(state_dict)
        self._binding = None

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _group_of(self) -> dict[int, dict[str, Any]]:
        return {
            id(parameter): group for group in self.param_groups for parameter in group["params"]
        }

    def _count_step(self) -> int:
        number = max(group["step"] for group in self.param_groups) + 1
        for group in self.param_groups:
            group["step"] = number
        return number

    def _name(self, parameter: Tensor) -> str:
        if self._distribution is not None:
            for index, tensor in self._distribution.tensors.items():
                if tensor is parameter:
                    return self._distribution.placements[index].weight.name
        names = [
            name
            for group in self.param_groups
            for name in group.get("param_names", [None] * len(group["params"]))
        ]
        position = next(i for i, p in enumerate(self._parameters()) if p is parameter)
        return names[position] or f"parameter.{position}"

    def _whole(self, parameters: Sequence[Tensor]) -> Distribution:
        """Unsharded parameters: the grid of one rank."""
        placements: list[Placement] = []
        for parameter in parameters:
            name = self._name(parameter)
            if parameter.dim() != 2 or parameter.dtype != torch.float32:
                raise ValueError(
                    f"Dion updates 2-D float32 matrices; {name} is"
                    f" {tuple(parameter.shape)} {parameter.dtype}: give it to another optimizer"
                )
            if not parameter.is_contiguous() or not parameter.numel():
                raise ValueError(f"Dion updates contiguous parameters; {name} is empty or strided")
            if name in {placement.weight.name for placement in placements}:
                raise ValueError(f"two parameters are called {name}: names seed random numbers")
            weight = Weight(name, *parameter.shape)
            placements.append(Placement(weight, start=0, bucket_numel=parameter.numel()))
        device = parameters[0].device if parameters else torch.device("cpu")
        return Distribution(placements, dict(enumerate(parameters)), device)

    def _bind(self, active: Sequence[Tensor]) -> "_Binding":
        """The blocks of the given parameters, kept until others are asked for."""
        if self._binding is None or not self._binding.is_of(active):
            distribution = self._distribution or self._whole(active)
            self._binding = _Binding(active, distribution, self.config, self.state)
        return self._binding


class _Binding:
    """Views of parameters, states and buffers, block by block, for one set of parameters."""

    def __init__(
        self,
        active: Sequence[Tensor],
        distribution: Distribution,
        config: DionConfig,
        state: dict[Tensor, dict[str, Tensor]],
    ) -> None:
        self._active = list(active)
        self._addresses = [parameter.data_ptr() for parameter in active]
        self.plan = distribution.plan(config)
        places = self._places(distribution)
        projections, tensor_sum = self._projections(places, distribution)
        self.exchange = ShardedExchange(
            self.plan,
            [
                (matrix, rectangle.row_start, view)
                for (_, matrix, rectangle), view in zip(places, projections, strict=True)
            ],
            tensor_sum,
            distribution.tensor_group,
            distribution.data_group,
            distribution.device,
        )
        for index, tensor in distribution.tensors.items():
            if not state[tensor]:
                state[tensor].update(self._first_state(index, tensor, config))
        self.held = self._hold(places, distribution, state, projections)

    def is_of(self, active: Sequence[Tensor]) -> bool:
        """Whether these are the bound parameters, still in the same memory."""
        same = len(active) == len(self._active)
        return (
            same
            and all(a is b for a, b in zip(active, self._active, strict=True))
            and [parameter.data_ptr() for parameter in active] == self._addresses
        )

    def _places(self, distribution: Distribution) -> list[tuple[int, int, Rectangle]]:
        """(placement, matrix, rectangle) of each block; first those summed over tensor ranks."""
        places = [
            (index, self.plan.first_matrix[index] + rectangle.part, rectangle)
            for index, rectangles in enumerate(self.plan.pieces)
            for rectangle in rectangles
        ]
        return sorted(places, key=lambda item: not _has_partial_rows(distribution, item[0]))

    def _projections(
        self,
        places: Sequence[tuple[int, int, Rectangle]],
        distribution: Distribution,
    ) -> tuple[list[Tensor], Tensor]:
        """Memory of R: a view (rows, r) for each block, and what tensor ranks must sum."""
        shapes = [(block.rows, self.plan.matrices[matrix].rank) for _, matrix, block in places]
        sizes = [rows * rank for rows, rank in shapes]
        memory = torch.zeros(sum(sizes), dtype=torch.float32, device=distribution.device)
        views = [
            part.view(shape)
            for part, shape in zip(memory.split(sizes) if sizes else (), shapes, strict=True)
        ]
        partial = sum(
            size
            for size, (index, _, _) in zip(sizes, places, strict=True)
            if _has_partial_rows(distribution, index)
        )
        return views, memory[:partial]

    def _first_state(self, index: int, tensor: Tensor, config: DionConfig) -> dict[str, Tensor]:
        factors = []
        for block in self.plan.pieces[index]:
            matrix = self.plan.matrices[self.plan.first_matrix[index] + block.part]
            rows = torch.arange(block.row_start, block.row_stop, device=tensor.device)
            values = normal(config.seed, f"{matrix.name}/right_factor", rows, matrix.rank)
            factors.append(values / matrix.rows**0.5)  # (rows, r), columns of about unit norm
        right = factors[0] if tensor.dim() == 2 else torch.cat([f.flatten() for f in factors])
        return {"momentum": torch.zeros_like(tensor), "right_factor": right}

    def _hold(
        self,
        places: Sequence[tuple[int, int, Rectangle]],
        distribution: Distribution,
        state: dict[Tensor, dict[str, Tensor]],
        projections: Sequence[Tensor],
    ) -> list[HeldBlock]:
        tiles = self.exchange.left_tiles()
        used: dict[int, int] = {}
        held = []
        for (index, matrix, rectangle), projection in zip(places, projections, strict=True):
            tensor = distribution.tensors[index]
            weight = distribution.placements[index].weight
            tile, left = tiles[matrix]
            first = used.get(index, 0)
            used[index] = first + projection.numel()
            right = state[tensor]["right_factor"].view(-1)[first : used[index]]
            first_column = weight.first_column(distribution.rank.tensor_parallel)
            first_tensor_rank = distribution.rank.tensor_parallel == 0
            tensors = Block(
                matrix=matrix,
                weight=_rectangle_view(tensor, rectangle),
                momentum=_rectangle_view(state[tensor]["momentum"], rectangle),
                right_factor=right.view_as(projection),
                left_factor=left[
                    rectangle.column_start - tile.start : rectangle.column_stop - tile.start
                ],
                projection=projection,
                counts_rows=rectangle.column_start == first_column
                and (weight.partition_dim == 0 or first_tensor_rank),
            )
            first_copy = weight.partition_dim is not None or first_tensor_rank
            held.append(
                HeldBlock(self.plan.matrices[matrix], rectangle, tensor, tensors, first_copy)
            )
        return held


@contextmanager
def _full_float32_products() -> Iterator[None]:
    """Keeps CUDA from computing float32 products in TF32, whose columns are not orthonormal."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _has_partial_rows(distribution: Distribution, index: int) -> bool:
    """Whether tensor-parallel ranks hold different columns of the same rows."""
    split = distribution.placements[index].weight.partition_dim == 1
    return split and distribution.grid.tensor_parallel_size > 1


def _rectangle_view(tensor: Tensor, rectangle: Rectangle) -> Tensor:
    """(rows, columns) view of a rectangle's elements in a rank's piece."""
    flat = tensor.detach().view(-1)
    part = flat[rectangle.offset : rectangle.offset + rectangle.numel]
    return part.view(rectangle.rows, rectangle.columns)
