"""What one can choose about Dion, and the two rules that follow from a matrix's shape."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dion.algorithm.products import PRECISIONS

ORTHONORMALIZERS = ("auto", "rcqr", "cqr", "qr")
RIGHT_FACTORS = ("colnorm", "orth")
DTYPES = ("fp32", "bf16")

_SCALE_FACTORS: dict[str, Callable[[int, int], float]] = {
    # Dion (arXiv 2504.05295): the update's RMS-to-RMS operator norm is one.
    "dion": lambda m, n: math.sqrt(m / n),
    # Moonlight (arXiv 2502.16982): the update's RMS is that of a typical AdamW update.
    "spectral": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    # The name that Megatron-core's Muon gives to the same factor as `dion`.
    "unit_rms_norm": lambda m, n: math.sqrt(m / n),
}
SCALE_MODES = tuple(_SCALE_FACTORS)


@dataclass(frozen=True)
class DionConfig:
    """Hyperparameters of Dion that are the same for every matrix.

    Attributes:
        momentum: error-feedback coefficient mu, in [0, 1).
        rank_fraction: rank of the update as a share of the smaller side, in (0, 1].
        rank_multiple_of: ranks are rounded up to a multiple of this.
        scale_mode: how the learning rate scales with the shape, one of `SCALE_MODES`.
        extra_scale_factor: multiplies the scale of every matrix.
        orthonormalizer: one of `ORTHONORMALIZERS`.
        oversample: rows of the sketch of `rcqr` per column, at least 1.
        eps: added to the column norms of R before dividing by them.
        right_factor: how R becomes Q: `colnorm` divides its columns by their norms (the paper),
            `orth` orthonormalizes them.
        fp32_matmul_prec: of the products of matrices with factors, one of `PRECISIONS`.
        momentum_dtype: in which M is stored, one of `DTYPES`; it is changed in fp32.
        factor_dtype: in which Q is stored.
        comm_dtype: in which P and R travel between ranks, and in which an all_reduce adds them.
        exchange_buffer_mib: MiB that the buffers of the exchange take at most on a rank; None for
            no limit.
        seed: of the right factors' first values and of the sketches.

    Raises:
        ValueError: a value is outside of its range.
    """

    momentum: float = 0.95
    rank_fraction: float = 0.25
    rank_multiple_of: int = 1
    scale_mode: str = "spectral"
    extra_scale_factor: float = 1.0
    orthonormalizer: str = "auto"
    oversample: float = 1.25
    eps: float = 1e-8
    right_factor: str = "colnorm"
    fp32_matmul_prec: str = "high"
    momentum_dtype: str = "fp32"
    factor_dtype: str = "fp32"
    comm_dtype: str = "fp32"
    exchange_buffer_mib: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._require("rank_fraction", 0 < self.rank_fraction <= 1, "in (0, 1]")
        self._require("rank_multiple_of", self.rank_multiple_of >= 1, "at least 1")
        self._require_one_of("scale_mode", SCALE_MODES)
        finite_scale = math.isfinite(self.extra_scale_factor) and self.extra_scale_factor > 0
        self._require("extra_scale_factor", finite_scale, "positive and finite")
        self._require_one_of("orthonormalizer", ORTHONORMALIZERS)
        self._require_one_of("right_factor", RIGHT_FACTORS)
        self._require_one_of("fp32_matmul_prec", PRECISIONS)
        for name in ("momentum_dtype", "factor_dtype", "comm_dtype"):
            self._require_one_of(name, DTYPES)
        self._require("oversample", 1 <= self.oversample < math.inf, "at least 1 and finite")
        self._require("eps", 0 < self.eps < math.inf, "positive and finite")
        limit = self.exchange_buffer_mib
        is_limit = limit is None or 0 < limit < math.inf
        self._require("exchange_buffer_mib", is_limit, "positive and finite")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")

    def _require_one_of(self, name: str, choices: tuple[str, ...]) -> None:
        self._require(name, getattr(self, name) in choices, f"one of {choices}")

    def rank(self, m: int, n: int) -> int:
        """Rank of the update of an m x n matrix: min(m, n, K ceil(fraction min(m, n) / K))."""
        multiple = self.rank_multiple_of
        # The small subtraction keeps 0.1 * 30 = 3.0000000000000004 from being rounded up to 4.
        multiples = math.ceil(self.rank_fraction * min(m, n) / multiple - 1e-9)
        return min(m, n, multiple * max(1, multiples))

    def scale(self, m: int, n: int) -> float:
        """Factor on the learning rate for the update of an m x n matrix (output x input)."""
        return self.extra_scale_factor * _SCALE_FACTORS[self.scale_mode](m, n)
