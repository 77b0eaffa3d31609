"""Measures a step of Dion on all ranks that take it, without a change to what it does.

Of every matrix, with B, P, R, M as in `megatron_dion.algorithm.step` and Q = R C as it is applied
to W (before Q is rounded to the type in which it is stored):

    ||B||_F^2, ||M||_F^2        sums of squares over the ranks
    G = R^T R, P^T P            (r, r), sums over the ranks, which hold rows of R and of P

With P orthonormal everything else follows from G: ||P R^T||_F^2 is its trace, the energies in the
directions that P found are its eigenvalues, and Q's Gram matrix is C^T G C.
"""

from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_dion.algorithm import Block, DionConfig, Observer, Section
from megatron_dion.algorithm.right_factor import (
    inner_products,
    to_orthonormal_columns,
    to_unit_columns,
)
from megatron_dion.optimizer.binding import StepSet
from megatron_dion.optimizer.diagnostics import ENERGY_LEVELS, MatrixDiagnostics
from megatron_dion.optimizer.stopwatch import Stopwatch
from megatron_dion.sharding import TORCH_DTYPES, Plan
from megatron_dion.sharding.balance import Charge, work
from megatron_dion.sharding.reducer import Reducer
from megatron_dion.sharding.reduction import Sum, Tile, reduction
from megatron_dion.sharding.replicas import average, in_groups

# Float64 copies of this many numbers stay in a processor's cache.
_NUMBERS_IN_CACHE = 1 << 16
# B and P R^T are float32: what a share of the energy may lack by rounding.
_ROUNDING = 1e-6
# Numbers beside the Gram matrices.
_TOTAL, _MOMENTUM, _RATE, _SECONDS = range(4)
_NUMBERS = 4


class Watch(Observer):
    """Measures one step of a set of matrices. All ranks of the grid must have one.

    The sums over ranks, float64, are made on the first rank in charge of P. They are packed like a
    P, in rows of r numbers: G, some numbers, P^T P. Who is in charge of no rows of P sends the
    first two only.

    Args:
        chosen: the set.
        config: hyperparameters.
    """

    def __init__(self, chosen: StepSet, config: DionConfig) -> None:
        plan = chosen.plan
        self._set = chosen
        self._config = config
        self._reducer = Reducer(
            reduction(plan.layout, plan.rank, {k: _sum_of(plan, k) for k in plan.members}),
            plan.matrices,
            chosen.groups,
            chosen.exchange.device,
            wire=torch.float64,
            dtype=torch.float64,
        )
        self._mine = {tile.matrix: view for tile, view in self._reducer.tile_views}
        self._time = Stopwatch()

    @contextmanager
    def allocated(self) -> Iterator[None]:
        """Memory of the sums, for the time of a step."""
        with self._reducer.held.allocated():
            self._reducer.tiles.zero_()
            yield

    def see_totals(self, learning_rates: Sequence[float]) -> None:
        """Looks at B, before the step, and at the learning rate of each block."""
        blocks = [stepped.tensors for stepped in self._set.stepped]
        self._add_squares(_TOTAL, blocks, [block.total for block in blocks])
        for block, lr in zip(blocks, learning_rates, strict=True):
            matrix = self._set.plan.matrices[block.matrix]
            share = block.multiplied_rows(block.total).numel() / (matrix.rows * matrix.columns)
            self._numbers(block.matrix)[_RATE] += lr * share

    def orthonormalize(
        self, sections: Sequence[Section], steps: Generator[None, None, int]
    ) -> Generator[None, None, int]:
        """Takes the time, and looks at P as it will be sent."""
        fallbacks = yield from _timed(steps, self._time)
        wire = TORCH_DTYPES[self._config.comm_dtype]
        for section in sections:
            rank = section.values.shape[1]
            self._mine[section.matrix][-rank:] += inner_products(section.values.to(wire))
        return fallbacks

    def see_projections(self, blocks: Sequence[Block]) -> None:
        """Looks at R."""
        for block in blocks:
            rank = block.projection.shape[-1]
            self._mine[block.matrix][:rank] += inner_products(block.counted_projection())

    def see_momenta(self) -> None:
        """Looks at M, after the step."""
        blocks = [stepped.tensors for stepped in self._set.stepped]
        self._add_squares(_MOMENTUM, blocks, [block.momentum for block in blocks])

    def results(self) -> Generator[None, None, list[MatrixDiagnostics]]:
        """Of the matrices of which this rank is the first in charge."""
        seconds, operations = self._time.read(), self._operations()
        for matrix, share in operations.items():
            self._numbers(matrix)[_SECONDS] += seconds * share / sum(operations.values())
        with self._reducer.transit.allocated():
            yield from self._reducer.sum()
            return [self._diagnostics(tile, sums) for tile, sums in self._reducer.sum_views]

    def _operations(self) -> dict[int, float]:
        """What this rank does to orthonormalize, by matrix."""
        plan = self._set.plan
        found: defaultdict[int, float] = defaultdict(float)
        for k in plan.members:
            for rank, operations in work(plan.matrices[k], plan.charges[k], plan.owners.get(k)):
                if rank == plan.rank:
                    found[k] += operations
        return found

    def _numbers(self, matrix: int) -> Tensor:
        """(_NUMBERS,) of this rank's."""
        return _numbers_of(self._mine[matrix])

    def _add_squares(self, number: int, blocks: Sequence[Block], tensors: Sequence[Tensor]) -> None:
        """Adds the squares of what this rank has to multiply; of the replicas' mean, of several."""
        rows = [
            block.multiplied_rows(tensor) for block, tensor in zip(blocks, tensors, strict=True)
        ]
        squares: list[Tensor] = []
        for group in in_groups(rows):
            if self._set.replicas > 1:
                group = [
                    tensor.clone(memory_format=torch.contiguous_format).float() for tensor in group
                ]
                average(group, self._set.groups.replicas)
            squares += [_squared_norm(tensor) for tensor in group]
        for block, value in zip(blocks, squares, strict=True):
            self._numbers(block.matrix)[number] += value

    def _diagnostics(self, tile: Tile, sums: Tensor) -> MatrixDiagnostics:
        matrix = self._set.plan.matrices[tile.matrix]
        m, n, rank = matrix.rows, matrix.columns, matrix.rank
        gram, left_gram = sums[:rank], sums[-rank:]
        total, momentum, rate, seconds = _numbers_of(sums).tolist()
        energies = _energies(gram)
        captured, largest = float(energies.sum()), float(energies[0])
        rate *= self._config.scale(m, n)
        mean_square, square = _squared_norms_of_right(gram, self._config)
        identity = torch.eye(rank, dtype=gram.dtype, device=gram.device)
        return MatrixDiagnostics(
            name=matrix.name,
            rows=m,
            columns=n,
            rank=rank,
            captured=(captured / total) ** 0.5 if total else None,
            stable_rank=total / largest if largest else None,
            orthonormality_error=float((left_gram - identity).norm()),
            update_rms=rate * (mean_square / (m * n)) ** 0.5,
            update_norm=rate * square**0.5,
            momentum_norm=momentum**0.5,
            owner_seconds=seconds,
            energy_ranks=_energy_ranks(energies, total),
        )


def _sum_of(plan: Plan, matrix: int) -> Sum:
    """What ranks bring for a matrix: its holders G and numbers, those in charge P^T P as well."""
    rank = plan.matrices[matrix].rank
    most = rank + _rows_of_numbers(rank) + rank
    charges = plan.charges[matrix]
    holders = dict.fromkeys(plan.layout.columns_of_holders[matrix], (0, most - rank))
    in_charge = {charge.rank: (0, most) for charge in charges}
    return Sum(holders | in_charge, (Charge(matrix, 0, most, charges[0].rank),))


def _rows_of_numbers(rank: int) -> int:
    return -(-_NUMBERS // rank)


def _numbers_of(rows: Tensor) -> Tensor:
    """(_NUMBERS,) of what is packed in (rows, r)."""
    rank = rows.shape[1]
    return rows[rank : rank + _rows_of_numbers(rank)].view(-1)[:_NUMBERS]


def _timed(steps: Generator[None, None, int], time: Stopwatch) -> Generator[None, None, int]:
    """Measures what a generator does, not what is done while it has yielded."""
    while True:
        with time.running():
            try:
                next(steps)
            except StopIteration as end:
                fallbacks: int = end.value
                return fallbacks
        yield


def _squared_norm(tensor: Tensor) -> Tensor:
    """Of (k, rows, columns), in float64, without a float64 copy of it."""
    numel = _NUMBERS_IN_CACHE if tensor.device.type == "cpu" else max(1, tensor.numel())
    norms = [
        torch.linalg.vector_norm(part, dtype=torch.float64)
        for rectangle in tensor
        for part in rectangle.reshape(-1).split(numel)
    ]
    return torch.stack(norms).square_().sum()


def _squared_norms_of_right(gram: Tensor, config: DionConfig) -> tuple[float, float]:
    """The squared Frobenius norm and the squared spectral norm of Q = R C, from R^T R."""
    if config.right_factor == "orth":
        factor = to_orthonormal_columns([gram], config.eps)[0].double()  # (r, r)
        right_gram = factor.T @ gram @ factor
    else:
        factor = to_unit_columns(gram.diagonal().sqrt(), config.eps).double()  # (r,)
        right_gram = factor.unsqueeze(1) * gram * factor
    return float(right_gram.trace()), float(_energies(right_gram)[0])


def _energies(gram: Tensor) -> Tensor:
    """Eigenvalues (r,) of a Gram matrix, the largest first; NaN if it is not finite."""
    if not gram.isfinite().all():
        return torch.full_like(gram[0], torch.nan)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


def _energy_ranks(energies: Tensor, total: float) -> tuple[int | None, ...]:
    """How many of the energies, the largest first, make up each of `ENERGY_LEVELS`."""
    if not total or energies.isnan().any():
        return (None,) * len(ENERGY_LEVELS)
    shares = energies.cumsum(0) / total  # (r,), increasing
    levels = torch.tensor(ENERGY_LEVELS, dtype=shares.dtype, device=shares.device) - _ROUNDING
    counts = torch.searchsorted(shares, levels) + 1  # the first that reaches it
    return tuple(count if count <= len(shares) else None for count in counts.tolist())
