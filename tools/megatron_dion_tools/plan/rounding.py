"""What `--dion-fp32-matmul-prec medium` costs besides: products that copy.

This and only this follows what `_Bf16Products` of algorithm/products.py allocates.
"""

import numpy as np

from megatron_dion_tools.plan.holdings import Counts

BYTES_PASSED = 16
"""More bytes that pass the memory for each element of a block than with float32 operands.

Of each of B^T Q and B P an element is written and read again in bf16, 4 bytes instead of none; of
R P^T and Q P^T the product is.
"""


def copied_bytes(elements: Counts, rows: Counts, columns: int, rank: int) -> Counts:
    """The most bytes that any product of a block allocates at a time.

    Args:
        elements: of the block.
        rows: of all its rectangles.
        columns: of the block.
        rank: r.
    """
    operands_and_product = 2 * (elements + (rows + columns) * rank)
    scaled_right = (4 + 2) * rows * rank  # R or Q, in float32, and rounded
    return np.maximum(operands_and_product, scaled_right)
