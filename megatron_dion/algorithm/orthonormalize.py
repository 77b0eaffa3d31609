"""Orthonormal columns for P: Cholesky QR, made twice.

The result is the Q of the QR decomposition P = Q U whose upper triangular U has a positive diagonal
(Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, ETNA 44, 2015). Both passes add a small shift to the
Gram matrix, so that a Cholesky factor always exists (Fukaya et al., SIAM J. Sci. Comput. 42, 2020).
Nothing depends on the values of a tensor, so a GPU is never waited for.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

NOISE = 1e-6
"""A column of P is rounding noise if its part orthogonal to the columns before it is shorter than
this fraction of the longest column."""

_SHIFT = 6 * 2.0**-24
"""Six roundings of a float32."""
_LEAST_BLOCK = 64
_LEAST_GPU_BLOCK = 256
_GPU_BLOCKS = 4
GRAM_NUMBERS = 1 << 24
"""Numbers of Gram matrices that there are at a time, 64 MiB, unless one is larger."""


Reduce = Callable[[Tensor, Any], None]
"""Combines a tensor, in place and by a `ReduceOp`, over the processes that hold rows of a P."""


def orthonormalize(batches: Sequence[Tensor], reduce: Reduce) -> None:
    """Orthonormalizes the columns of every P, in place.

    A column that depends linearly on those before it, as far as float32 can tell, becomes zero. So
    the result is finite for every finite P, its other columns are orthonormal, and rounding, which
    differs between topologies, does not decide its direction.

    A pass turns a singular value x of P, with columns of unit length, into x / sqrt(x^2 + s),
    s = `_shift`, so no value exceeds one. The residual of a column is what the columns before it
    leave of it. The first pass turns a residual x into about x / sqrt(s), which the second pass
    compares with the shift: a column is dependent if x < 4 s, or if x is `NOISE`. In the end every
    other column gets length one.

    Args:
        batches: each (batch, rows, r) float32, the rows of P that this process holds; r may exceed
            the rows. Processes that share matrices pass the same batches, with rows of their own.
        reduce: combines the processes.
    """
    if not batches:
        return
    _scale(batches, reduce)
    for groups in _calls(batches):
        _orthonormalize(groups, reduce)


def _orthonormalize(groups: Sequence[Sequence[Tensor]], reduce: Reduce) -> None:
    """As `orthonormalize`, of P whose largest entry is one, all in one go."""
    sizes = [sum(map(len, group)) * group[0].shape[2] ** 2 for group in groups]
    packed = torch.zeros(sum(sizes), device=groups[0][0].device)
    grams = [
        memory.view(-1, group[0].shape[2], group[0].shape[2])
        for group, memory in zip(groups, packed.split(sizes), strict=True)
    ]
    noises: list[Tensor] = []  # what the square of a residual must exceed, by what the first left
    _multiply(groups, grams)
    reduce(packed, ReduceOp.SUM)
    for group, gram in zip(groups, grams, strict=True):
        # A column shorter than 1e-10 of the longest is noise, whatever its length becomes.
        scales = gram.diagonal(dim1=1, dim2=2).clamp(min=1e-20).rsqrt_()  # (batch, r)
        gram.mul_(scales.unsqueeze(1)).mul_(scales.unsqueeze(2))
        for p, scale in _by_batch(group, scales):
            p *= scale.unsqueeze(1)  # columns of length one
        diagonal = _divide(group, gram, _shift(gram))
        relative = scales / scales.amin(dim=1, keepdim=True)  # the longest column by each
        noises.append((relative / diagonal).square_().mul_(NOISE**2))
    _multiply(groups, grams)
    reduce(packed, ReduceOp.SUM)
    for group, gram, noise in zip(groups, grams, noises, strict=True):
        shift = _shift(gram)
        diagonal = _divide(group, gram, shift)
        squares = diagonal.square().sub_(shift, alpha=_SHIFT)  # of the residuals
        is_dependent = squares <= torch.maximum(15 * _SHIFT * shift, noise)
        lengthened = diagonal / squares.sqrt_()  # by what the shift took
        for p, factor in _by_batch(group, lengthened.masked_fill_(is_dependent, 0)):
            p *= factor.unsqueeze(1)


def orthonormalize_flops(rows: int, rank: int) -> int:
    """Operations for `rows` rows of a P (n, r): Gram matrix and division, twice each."""
    blocks = len(_blocks(rank, are_small=False))
    fraction = (blocks + 1) / (2 * blocks)  # of the full product: triangles by blocks
    return int(2 * (2 * 2 * rows * rank**2 * fraction + rank**3 / 3))


def orthonormalize_bytes(batches: Sequence[Tensor]) -> int:
    """Bytes that `orthonormalize` takes beside P: Gram matrices, and what divides a group."""
    most = 0
    for groups in _calls(batches):
        grams = [4 * sum(map(len, group)) * group[0].shape[2] ** 2 for group in groups]
        products = [4 * max(p.numel() + p.shape[2] ** 2 for p in group) for group in groups]
        dividing = max(3 * g + p for g, p in zip(grams, products, strict=True))
        most = max(most, sum(grams) + dividing)
    return most


def _scale(batches: Sequence[Tensor], reduce: Reduce) -> None:
    """Makes the largest entry of every P one, so that no square overflows.

    Squares that underflow then belong to columns that are noise.
    """
    packed = torch.cat(
        [p.abs().amax((1, 2)) if p.numel() else p.new_zeros(len(p)) for p in batches]
    )
    reduce(packed, ReduceOp.MAX)
    scales = packed.clamp_(min=torch.finfo(torch.float32).tiny).split([len(p) for p in batches])
    for p, scale in zip(batches, scales, strict=True):
        p /= scale.view(-1, 1, 1)


def _calls(batches: Sequence[Tensor]) -> list[list[list[Tensor]]]:
    """Parts of batches, whose Gram matrices are there at a time, in groups.

    Gram matrices of a group are factored together: on a GPU those of the same r. Ranks that share
    matrices have them in the same order and begin a call at the same one, whatever the batches.
    """
    calls: list[list[list[Tensor]]] = []
    left = 0  # numbers for which the call has room
    for batch in sorted(batches, key=lambda p: -p.shape[2]):
        size, rest = batch.shape[2] ** 2, batch
        while len(rest):
            if not calls or left < size:
                calls.append([])
                left = GRAM_NUMBERS
            p, rest = rest.tensor_split([max(1, left // size)])
            left -= len(p) * size
            groups = calls[-1]
            if groups and groups[-1][0].shape[2] == p.shape[2] and not is_cpu(p):
                groups[-1].append(p)
            else:
                groups.append([p])
    return calls


def _by_batch(group: Sequence[Tensor], values: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Every P of a group with what is its own of values (batch, ...) of all matrices."""
    return zip(group, values.split([len(p) for p in group]), strict=True)


def _multiply(groups: Sequence[Sequence[Tensor]], grams: Sequence[Tensor]) -> None:
    """G = P^T P; of G (batch, r, r) only the upper triangle of blocks."""
    for group, all_grams in zip(groups, grams, strict=True):
        for p, gram in _by_batch(group, all_grams):
            for start, stop in _blocks(p.shape[2], is_cpu(p)):
                block = gram[:, start:stop, start:]
                block.baddbmm_(p[:, :, start:stop].mT, p[:, :, start:], beta=0)


def _shift(gram: Tensor) -> Tensor:
    """The shift (batch, 1) over `_SHIFT`: above the rounding of G of columns of unit length.

    The rounding grows with the norm of the upper triangle, which is about sqrt(r) for orthonormal
    columns and r for parallel ones. G (batch, r, r) is zero below the blocks of `_multiply`.
    """
    return torch.linalg.vector_norm(gram, dim=(1, 2)).add_(8 / 3).unsqueeze(1)


def _divide(group: Sequence[Tensor], gram: Tensor, shift: Tensor) -> Tensor:
    """P = P U^-1, in place, with the Cholesky factor U of the shifted G.

    Args:
        group: the P, each (batch, rows, r).
        gram: G, of which the upper triangle is overwritten, (batch, r, r).
        shift: what `_shift` returned.

    Returns:
        The diagonal of U, (batch, r).
    """
    gram.diagonal(dim1=1, dim2=2).add_(shift, alpha=_SHIFT)
    diagonals = _divide_columns(group, gram, 0, gram.shape[1])
    return diagonals[0] if len(diagonals) == 1 else torch.cat(diagonals, dim=1)


def _divide_columns(group: Sequence[Tensor], gram: Tensor, start: int, stop: int) -> list[Tensor]:
    """Computes rows start:stop of U and columns start:stop of P U^-1, both in place.

    The contributions of the columns before `start` have been subtracted. On a CPU, on which torch's
    factorization of a large matrix takes longer than the products with P, the factorization and the
    division take turns, for one half of the columns and then for the other.

    Returns:
        The diagonal of U in these rows, in parts (batch, size).
    """
    size = stop - start
    if size > _LEAST_BLOCK and is_cpu(gram):
        middle = start + size // 2
        first = _divide_columns(group, gram, start, middle)
        upper = gram[:, start:middle, middle:]
        gram[:, middle:stop, middle:].baddbmm_(upper[:, :, : stop - middle].mT, upper, alpha=-1)
        for p, part in _by_batch(group, upper[:, :, : stop - middle]):
            p[:, :, middle:stop].baddbmm_(p[:, :, start:middle], part, alpha=-1)
        return first + _divide_columns(group, gram, middle, stop)
    rows = gram[:, start:stop, start:]
    upper = torch.linalg.cholesky_ex(rows[:, :, :size], upper=True).L
    identity = torch.eye(size, device=gram.device)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    if stop < gram.shape[1]:
        rows[:, :, size:] = inverse.mT @ rows[:, :, size:]
    for p, part in _by_batch(group, inverse):
        p[:, :, start:stop] = _by_triangle(p[:, :, start:stop], part)
    return [upper.diagonal(dim1=1, dim2=2)]


def _by_triangle(columns: Tensor, triangle: Tensor) -> Tensor:
    """The product of (batch, rows, size) with an upper triangle (batch, size, size)."""
    product = torch.empty_like(columns)
    for i, j in _blocks(columns.shape[2], is_cpu(columns)):
        torch.bmm(columns[:, :, :j], triangle[:, :j, i:j], out=product[:, :, i:j])
    return product


def _blocks(rank: int, are_small: bool) -> list[tuple[int, int]]:
    """Blocks of columns, of whose triangles both halves are computed; a GPU has few."""
    size = _LEAST_BLOCK if are_small else max(_LEAST_GPU_BLOCK, -(-rank // _GPU_BLOCKS))
    return [(start, min(start + size, rank)) for start in range(0, rank, size)]


def is_cpu(tensor: Tensor) -> bool:
    """Whether few calls are worth less than what stays in the cache."""
    return tensor.device.type == "cpu"
