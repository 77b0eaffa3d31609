"""Random numbers as a pure function of what they are for.

A value depends only on (seed, purpose, row, column), so every process, on any device and in any
topology, computes the same value for the same element without talking to the others. All steps up
to the last multiplication are integer arithmetic, so CPU and GPU agree to the last bit.
"""

import hashlib
import math

import torch
from torch import Tensor

_WORD_BITS = 64
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed word: an odd, well mixed increment
_LANES = 4  # 16-bit lanes of a word, whose sum is close to normal (Irwin-Hall)


def normal(seed: int, purpose: str, rows: Tensor, columns: int) -> Tensor:
    """Independent values of mean 0 and variance 1, close to normally distributed.

    Args:
        seed: of the whole run.
        purpose: what the numbers are for, such as a matrix's name.
        rows: global row numbers, (rows,) int64, any order.
        columns: number of columns.

    Returns:
        (rows, columns), float32, on the device of `rows`.
    """
    random = words(seed, purpose, rows, columns)  # (rows, columns)
    total = torch.zeros_like(random)
    for lane in range(_LANES):
        total += (random >> (16 * lane)) & 0xFFFF
    mean = _LANES * 65535 / 2
    deviation = math.sqrt(_LANES * (65536**2 - 1) / 12)
    return (total - mean).float() * (1 / deviation)


def signs(seed: int, purpose: str, rows: Tensor, columns: int) -> Tensor:
    """Independent values of -1 and +1; arguments and result as for `normal`."""
    random = words(seed, purpose, rows, math.ceil(columns / _WORD_BITS))
    shifts = torch.arange(_WORD_BITS, device=rows.device)
    bits = (random.unsqueeze(-1) >> shifts) & 1  # (rows, words, 64)
    return (2 * bits - 1).flatten(1)[:, :columns].float()  # (rows, columns)


def words(seed: int, purpose: str, rows: Tensor, columns: int) -> Tensor:
    """One pseudo-random 64-bit word for each row and column; arguments as for `normal`."""
    row_keys = _mix(rows * _GOLDEN + _key(seed, purpose))  # (rows,)
    offsets = torch.arange(1, columns + 1, device=rows.device) * _GOLDEN
    return _mix(row_keys.unsqueeze(1) + offsets)  # (rows, columns)


def _key(seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mix(words: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014, figure 16)."""
    words = (words ^ _shift_right(words, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    words = (words ^ _shift_right(words, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return words ^ _shift_right(words, 31)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own repeats the sign bit."""
    return (words >> bits) & ((1 << (_WORD_BITS - bits)) - 1)
