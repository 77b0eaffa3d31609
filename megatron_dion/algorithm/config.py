"""The hyperparameters of Dion, each written down once, and what follows from them for a matrix.

The command line has a flag `--dion-NAME` for every field but `seed`, which is Megatron's `--seed`.
A flag's type, default, help (the docstring below the field) and range all come from the field.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

_SCALES: dict[str, Callable[[int, int], float]] = {
    # Dion (arXiv 2504.05295): the RMS-to-RMS operator norm of an update is one.
    "dion": lambda m, n: math.sqrt(m / n),
    # Moonlight (arXiv 2502.16982): the RMS of an update is that of a typical AdamW update.
    "spectral": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    # The name that Megatron-core's Muon gives to the factor of `dion`.
    "unit_rms_norm": lambda m, n: math.sqrt(m / n),
}


def checked(
    default: Any, holds: Callable[[Any], bool], requirement: str, **argparse_keywords: Any
) -> Any:
    """A dataclass field with a requirement, which `check_fields` tests.

    The requirement ends the sentence "NAME must be ...", in the error and in the flag's help.
    """
    metadata = {"check": (holds, requirement), "argparse_meta": argparse_keywords}
    return field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Checks every field of a dataclass: choices by its `Literal` type, others by `checked`.

    Raises:
        ValueError: the message begins with the name of the field.
    """
    for each in fields(config):
        value = getattr(config, each.name)
        if get_origin(each.type) is Literal and value not in get_args(each.type):
            raise ValueError(f"{each.name} must be one of {get_args(each.type)}, not {value!r}")
        holds, requirement = each.metadata.get("check", (None, None))
        if holds is not None and not holds(value):
            given = sorted(value) if isinstance(value, frozenset) else value
            raise ValueError(f"{each.name} must be {requirement}, not {given!r}")


@dataclass(frozen=True)
class DionConfig:
    """Hyperparameters of Dion that are the same for every matrix.

    Raises:
        ValueError: a value is outside of its range.
    """

    rank_fraction: float = checked(0.25, lambda x: 0 < x <= 1, "in (0, 1]")
    """Rank of an update as a fraction of the smaller side of the matrix."""

    rank_multiple_of: int = checked(1, lambda k: k >= 1, "at least 1")
    """Round ranks up to a multiple of this number."""

    momentum: float = checked(0.95, lambda x: 0 <= x < 1, "in [0, 1)")
    """Coefficient mu of momentum and error feedback."""

    residual: Literal["rows", "none"] = "rows"
    """How a weight moves along what P does not capture of B: none, with error feedback, is the
    paper's Dion; with rows, every row of the residual moves by the same length."""

    scale_mode: Literal["dion", "spectral", "unit_rms_norm"] = "spectral"
    """How the size of an update depends on the shape m x n of its matrix: spectral is
    0.2 sqrt(max(m, n)), dion and unit_rms_norm are sqrt(m / n)."""

    extra_scale_factor: float = checked(1.0, lambda x: 0 < x < math.inf, "positive and finite")
    """Multiply every update by this number."""

    eps: float = checked(1e-8, lambda x: 0 < x < math.inf, "positive and finite")
    """Add this number to the column norms of R before R is divided by them."""

    fp32_matmul_prec: Literal["highest", "high", "medium"] = "high"
    """Precision of the products of matrices with factors: highest is fp32, high lets a GPU use
    TF32, medium lets a CPU use bf16."""

    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the momentum is stored; it is changed in fp32."""

    factor_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which right factors are stored."""

    comm_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the factors P and R travel between ranks."""

    exchange_sets: int = checked(2, lambda n: n >= 1, "at least 1")
    """Step the weights in this many sets, of which two are under way at a time: more sets need less
    memory for the exchange, and more collectives."""

    seed: int = 0
    """Seed of the first right factors."""

    def __post_init__(self) -> None:
        check_fields(self)

    def rank(self, m: int, n: int) -> int:
        """Rank r of the update of an m x n matrix: min(m, n, K ceil(fraction min(m, n) / K))."""
        multiple = self.rank_multiple_of
        # The small subtraction keeps 0.1 * 30 = 3.0000000000000004 from being rounded up to 4.
        multiples = math.ceil(self.rank_fraction * min(m, n) / multiple - 1e-9)
        return min(m, n, multiple * max(1, multiples))

    def residual_row(self, m: int, n: int) -> float:
        """Length by which a row of the residual moves, before the scale.

        Q P^T has the squared norm r. The rows of the residual add min(m, n) - r, so an update has
        the norm of an orthonormal matrix of full rank.
        """
        return math.sqrt((min(m, n) - self.rank(m, n)) / m)

    def scale(self, m: int, n: int) -> float:
        """Factor on the learning rate for the update of an m x n matrix (output x input)."""
        return self.extra_scale_factor * _SCALES[self.scale_mode](m, n)
