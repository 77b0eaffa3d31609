"""Orthonormal bases of the column spaces of tall matrices, batched, whole or in parts.

Every method returns the same thing up to rounding: the Q of the QR decomposition P = Q U whose
upper triangular U has a positive diagonal. So the choice of a method, or a fall back to another,
does not change which run it is.

The rows of P may be divided over several processes, in two ways. Either each makes a QR of its own
rows (`factor`), and one brings the triangles together (TSQR: Demmel, Grigori, Hoemmen and Langou,
SIAM J. Sci. Comput. 34, 2012), which sends least. Or all add up what is small (the Gram matrix and
such), and `orthonormalize_part` asks for each sum by yielding: that leaves least to any of them.
"""

import math
from collections.abc import Callable, Generator
from functools import lru_cache

import torch
from torch import Tensor

from megatron_dion.algorithm.counter_random import signs

Sketch = Callable[[int], Tensor]
"""Given a number of rows k, independent random signs: (batch, k, n), or (1, k, n) for all."""

PartialSums = Generator[Tensor, Tensor, tuple[Tensor, Tensor]]
"""Yields a part's (batch, k, r), expects the sum over the parts; returns result and failures."""

PROBES = 4
"""Vectors on which a Cholesky method's result is tested."""

ONCE = "once"
"""One Cholesky QR, which is what `auto` does of columns that are nearly orthogonal."""

INVERTED_AT_ONCE = 32
"""Size of triangles that a CPU inverts by a solve."""

_LEAST_SQUARE = 1e-30
"""Of the norm of a column: what float32 loses of smaller entries' squares does not matter then."""

_GROWTH = 50.0
"""What the rounding of a Gram matrix may grow by: to some 5e-6 in inner products of the result.

A column of the result is a combination of columns of P. If these have unit norm, an error d of
their inner products becomes about d times the sum of the squares of its coefficients."""


def orthonormalize(p: Tensor, method: str, sketch: Sketch, oversample: float) -> tuple[Tensor, int]:
    """Orthonormalizes the columns of each matrix of a batch.

    Where the columns are linearly dependent (all zero, say), the result is completed by some
    orthonormal columns: it is finite and orthonormal for every finite input.

    Args:
        p: (batch, n, r) float32 with r <= n.
        method: `rcqr`: randomized Cholesky QR: the triangle of a sketch of P preconditions one
            Cholesky QR (Higgins et al., arXiv 2309.05868); `cqr`: Cholesky QR, twice (Yamamoto
            et al. 2015); `qr`: Householder; `auto`: one Cholesky QR where the columns are nearly
            orthogonal already, as power iteration makes them, and else what is fastest on P's
            device, `qr` on a CPU and `rcqr` elsewhere.
        sketch: the random matrices of `rcqr`.
        oversample: rows of the sketch per column of P.

    Returns:
        (batch, n, r), orthonormal columns, and the number of matrices for which `rcqr` or `cqr`
        broke down, so that they were done by Householder QR instead.
    """
    if method == "auto":
        return _automatic(p, sketch, oversample)
    if method == "qr":
        return householder(p), 0
    part = orthonormalize_part(p, method, sketch, oversample)
    try:
        partial = next(part)
        while True:
            partial = part.send(partial)  # the only part is the sum
    except StopIteration as end:
        candidate, failed = end.value
    # The host waits for the device here, once for each shape.
    broken = failed.nonzero().flatten()
    if broken.numel():
        candidate[broken] = householder(p[broken])
    return candidate, broken.numel()


def usual_method(method: str, rows: int, rank: int, device: str) -> str:
    """How P is orthonormalized unless that fails: for `auto` `once`, or the sure method.

    Args:
        method: as for `orthonormalize`.
        rows: n. Of nearly square matrices the columns seldom are nearly orthogonal.
        rank: r.
        device: type of P's device.
    """
    is_tried = method == "auto" and 2 * rank <= rows
    return ONCE if is_tried else sure_method(method, device)


def sure_method(method: str, device: str) -> str:
    """What a method is for any P."""
    if method == "auto":
        return "qr" if device == "cpu" else "rcqr"
    return method


def usual_part_method(method: str, rows: int, rank: int) -> str:
    """As `usual_method`, of a P whose rows are divided: `once`, `rcqr` or `cqr`."""
    return usual_method(method, rows, rank, "parts")


def _automatic(p: Tensor, sketch: Sketch, oversample: float) -> tuple[Tensor, int]:
    device = p.device.type
    sure = sure_method("auto", device)
    _, rows, rank = p.shape
    if usual_method("auto", rows, rank, device) != ONCE:
        return orthonormalize(p, sure, sketch, oversample)
    to_base, failed = _cholesky(p.mT @ p)
    candidate = p @ to_base
    # The host waits for the device here, once for each shape.
    broken = failed.nonzero().flatten()
    if not broken.numel():
        return candidate, 0
    candidate[broken], fallbacks = orthonormalize(
        p[broken], sure, _sketch_of(sketch, broken), oversample
    )
    return candidate, fallbacks


def orthonormalize_part(p: Tensor, method: str, sketch: Sketch, oversample: float) -> PartialSums:
    """The rows of `orthonormalize`'s result that belong to some rows of P.

    Args:
        p: (batch, rows, r) float32, the rows of this part.
        method: `once`, `rcqr` or `cqr`.
        sketch: gives the columns of the random matrices that belong to these rows.
        oversample: rows of the sketch per column of P.

    Yields:
        (batch, k, r) to be summed over all parts, with k as `summed_rows` says; the sum is to be
        sent back. All parts must get the same bits.

    Returns:
        (batch, rows, r), and which matrices of the batch broke down (batch,), the same for all
        parts up to rounding: they must agree before any of them uses it.
    """
    rank = p.shape[2]
    if method == ONCE:
        packed = yield pack(p.mT @ p)  # of a symmetric (batch, r, r)
        to_base, failed = _cholesky(unpack(packed, rank))
        return p @ to_base, failed
    if method == "rcqr":
        sketched = yield sketch(sketch_rows(rank, oversample)) @ p  # (batch, k, r)
        scale = _column_scale(sketched)
        candidate = yield from _cholesky_qr(_preconditioned(p / scale, sketched / scale))
    elif method == "cqr":
        total = yield p.abs().sum(dim=1, keepdim=True)  # (batch, 1, r)
        first = yield from _cholesky_qr(p / _column_scale(total))
        candidate = yield from _cholesky_qr(first)
    else:
        raise ValueError(f"unknown orthonormalizer {method!r}")
    # A nearly singular Gram matrix may well have a Cholesky factor, so the result itself is tested:
    # applied to a few vectors of signs, Q^T Q - I must vanish up to rounding.
    probes = _probes(rank, p.device)  # (r, 4)
    seen = yield (candidate.mT @ (candidate @ probes)).mT.contiguous()  # (batch, 4, r)
    error = (seen - probes.T).abs().amax(dim=(1, 2))  # (batch,)
    return candidate, ~(error < 5e-6 * math.sqrt(rank))


def summed_rows(method: str, rank: int, oversample: float) -> tuple[int, ...]:
    """The k of each (batch, k, r) that `orthonormalize_part` yields, in their order."""
    gram = packed_rows(rank, rank)
    if method == ONCE:
        return (gram,)
    if method == "rcqr":
        return sketch_rows(rank, oversample), gram, PROBES
    return 1, gram, gram, PROBES


def sketch_rows(rank: int, oversample: float) -> int:
    """Rows of the sketch of `rcqr`; a few more keep that of few columns from being singular."""
    return max(math.ceil(oversample * rank), rank + 8)


def factor(p: Tensor, method: str, sketch: Sketch, oversample: float) -> tuple[Tensor, Tensor, int]:
    """A QR decomposition of any rows of P, perhaps fewer than columns.

    Args:
        p: (batch, rows, r) float32.
        method: as for `orthonormalize`, like the others.
        sketch: the random matrices of `rcqr`.
        oversample: rows of the sketch per column.

    Returns:
        With k = min(rows, r) the orthonormal (batch, rows, k), the upper trapezoidal (batch, k, r),
        of which P is the product, and the number of matrices that were done by Householder QR.
    """
    sure = sure_method(method, p.device.type)
    if sure == "qr":
        return *_householder(p), 0
    q, failures = orthonormalize(p[:, :, : p.shape[1]], sure, sketch, oversample)
    return q, (q.mT @ p).triu(), failures


def _sketch_of(sketch: Sketch, chosen: Tensor) -> Sketch:
    """For some matrices of a batch."""

    def of_chosen(rows: int) -> Tensor:
        drawn = sketch(rows)
        return drawn if len(drawn) == 1 else drawn[chosen]

    return of_chosen


def packed_rows(rows: int, rank: int) -> int:
    """Rows of r numbers that the triangle of so many rows of P takes when it is packed."""
    height = min(rows, rank)
    return -(-height * (2 * rank - height + 1) // (2 * rank))


def pack(trapezoids: Tensor) -> Tensor:
    """Upper trapezoidal (batch, k, r) without their zeros: (batch, `packed_rows`, r)."""
    batch, height, rank = trapezoids.shape
    inside = _inside(height, rank, trapezoids.device)
    rows = packed_rows(height, rank)
    packed = trapezoids.new_zeros(batch, rows * rank)
    packed[:, : len(inside)] = trapezoids.flatten(1).index_select(1, inside)
    return packed.view(batch, rows, rank)


def unpack(packed: Tensor, height: int) -> Tensor:
    """The way back, with zeros below the diagonal: (batch, height, r)."""
    batch, _, rank = packed.shape
    inside = _inside(height, rank, packed.device)
    found = packed.new_zeros(batch, height * rank)
    found.index_copy_(1, inside, packed.flatten(1)[:, : len(inside)])
    return found.view(batch, height, rank)


def _inside(height: int, rank: int, device: torch.device) -> Tensor:
    """Where the upper triangle's numbers are in a flattened (height, r)."""
    row, column = torch.triu_indices(height, rank, device=device)
    return row * rank + column


def householder(p: Tensor) -> Tensor:
    """Householder QR of (batch, n, r) with a positive diagonal: for every finite input."""
    # LAPACK's norms neither overflow nor vanish.
    scaled = p if p.device.type == "cpu" else p / _column_scale(p)
    return _base(*_reflected(scaled))


def _householder(p: Tensor) -> tuple[Tensor, Tensor]:
    """With the triangle, and for any number of rows: (batch, n, k) and (batch, k, r)."""
    scale = _column_scale(p)
    reflectors, factors, signs = _reflected(p / scale)
    height = factors.shape[1]
    triangle = reflectors[:, :height].triu() * signs.unsqueeze(-1) * scale
    return _base(reflectors[:, :, :height], factors, signs), triangle


def _reflected(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As torch.linalg.qr, without the copies that it makes of the triangle.

    Returns:
        Reflectors below the triangle, their factors, and the signs of the triangle's diagonal.
    """
    reflectors, factors = torch.geqrf(p)
    diagonal = reflectors.diagonal(dim1=1, dim2=2)
    return reflectors, factors, torch.where(diagonal < 0, -1.0, 1.0)


def _base(reflectors: Tensor, factors: Tensor, signs: Tensor) -> Tensor:
    q = torch.linalg.householder_product(reflectors, factors)  # (batch, n, k)
    return q.mul_(signs.unsqueeze(-2))


@lru_cache(maxsize=64)
def _probes(rank: int, device: torch.device) -> Tensor:
    """Some vectors of signs (r, 4), the same on every process."""
    return signs(0, "probe", torch.arange(rank, device=device), PROBES)


def _column_scale(p: Tensor) -> Tensor:
    """Largest entries of columns (batch, 1, r), so that squares neither overflow nor vanish.

    The scaling of columns is absorbed by U: Q does not change.
    """
    largest = p.abs().amax(dim=1, keepdim=True)  # (batch, 1, r)
    return torch.where(largest > 0, largest, 1.0)


def _preconditioned(p: Tensor, sketched: Tensor) -> Tensor:
    triangle = torch.linalg.qr(sketched, mode="r").R  # (batch, r, r)
    diagonal = triangle.diagonal(dim1=1, dim2=2)
    triangle = triangle * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-1)
    return torch.linalg.solve_triangular(triangle, p, upper=True, left=False)  # (batch, rows, r)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """What makes P orthonormal from the right, (batch, r, r), of its Gram matrix P^T P.

    Also where it is not to be used (batch,): squares have left float32, or columns of unit norm are
    so near each other that rounding grows too much.
    """
    squares = gram.diagonal(dim1=1, dim2=2)  # (batch, r)
    norms = squares.sqrt()
    unit = gram / norms.unsqueeze(1) / norms.unsqueeze(2)
    upper, info = torch.linalg.cholesky_ex(unit, upper=True)
    inverse = _inverse(upper)
    growth = inverse.square().sum(dim=1).amax(dim=1)  # (batch,)
    is_fine = (info == 0) & (growth < _GROWTH) & (squares > _LEAST_SQUARE).all(dim=1)
    return inverse / norms.unsqueeze(2), ~is_fine


def _inverse(upper: Tensor) -> Tensor:
    """Of upper triangles (batch, r, r); on a CPU by halves, since products are faster there."""
    size = upper.shape[1]
    if size <= INVERTED_AT_ONCE or upper.device.type != "cpu":
        identity = torch.eye(size, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    half = size // 2
    first, last = _inverse(upper[:, :half, :half]), _inverse(upper[:, half:, half:])
    inverse = torch.zeros_like(upper)
    inverse[:, :half, :half] = first
    inverse[:, half:, half:] = last
    inverse[:, :half, half:] = -(first @ upper[:, :half, half:] @ last)
    return inverse


def _cholesky_qr(p: Tensor) -> Generator[Tensor, Tensor, Tensor]:
    """One Cholesky QR; a matrix whose Gram matrix has no factor comes back as NaN."""
    packed = yield pack(p.mT @ p)  # of a symmetric (batch, r, r)
    # Of a Hermitian matrix the upper triangle is all that is read.
    triangle, info = torch.linalg.cholesky_ex(unpack(packed, p.shape[2]), upper=True)
    triangle = torch.where((info == 0).view(-1, 1, 1), triangle, math.nan)
    return torch.linalg.solve_triangular(triangle, p, upper=True, left=False)
