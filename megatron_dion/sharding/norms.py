"""Squared norms that ranks sum: of the columns of R, of B, and of rows of B that ranks share."""

from collections import Counter

import torch

from megatron_dion.algorithm.exchange import Steps
from megatron_dion.sharding.buffers import Buffers
from megatron_dion.sharding.collectives import Setup, all_reduce, ring_bytes


class NormExchange:
    """Float64 squares in one buffer, in such an order that each group needs one all_reduce.

        shared rows | shared cut rows | columns of R, and B | other cut rows | other rows
        --------------------- tensor ----------------------
                      ------------------------- data ----------------------

    Shared rows are those that tensor-parallel ranks share. Several data-parallel ranks hold columns
    of a cut row; every rank has a place for every cut row. A step without residual has no rows.
    """

    def __init__(self, setup: Setup, memory: Buffers) -> None:
        plan, layout = setup.plan, setup.plan.layout
        rectangles = plan.rectangles if setup.has_residual else ()
        cut: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by whether they are shared
        for placement in plan.placements if setup.has_residual else ():
            rows = layout.cut_rows(placement)
            cut[layout.shares_rows(placement)] += [(placement, row) for row in rows]
        whole = {True: 0, False: 0}
        for placement, rectangle in rectangles:
            if not rectangle.cut:
                whole[layout.shares_rows(placement)] += rectangle.rows
        count = sum(layout.matrices[k].rank + 1 for k in plan.members)
        sizes = [whole[True], len(cut[True]), count, len(cut[False]), whole[False]]
        self._memory = memory.empty(sum(sizes), torch.float64)
        shared, shared_cut, of_matrices, other_cut, other = self._memory.split(sizes)
        ranks = [layout.matrices[k].rank for k in plan.members]
        columns, totals = of_matrices.tensor_split([sum(ranks)])
        self.columns = dict(zip(plan.members, columns.split(ranks) if ranks else (), strict=True))
        self.totals = dict(zip(plan.members, totals.view(-1, 1), strict=True))
        self._of_tensor = self._memory[: sum(sizes[:3])]
        self._of_data = self._memory[sizes[0] : sum(sizes[:4])]
        self._groups = setup.groups
        self._grid = layout.grid
        place = dict(zip(cut[True], shared_cut.view(-1, 1), strict=True))
        place |= zip(cut[False], other_cut.view(-1, 1), strict=True)
        self.of_rectangles = [self._memory[:0]] * len(plan.rectangles)  # (rows,) each
        # Rows of a matrix lie side by side.
        order = sorted(enumerate(rectangles), key=lambda each: each[1][1].matrix)
        for index, (placement, rectangle) in order:
            if rectangle.cut:
                row = layout.local_row(placement, rectangle, plan.rank)
                self.of_rectangles[index] = place[placement, row]
            elif layout.shares_rows(placement):
                self.of_rectangles[index], shared = shared.tensor_split([rectangle.rows])
            else:
                self.of_rectangles[index], other = other.tensor_split([rectangle.rows])

    def clear(self) -> None:
        """Sets all squares to zero."""
        self._memory.zero_()

    def sum(self) -> Steps:
        """Sums the squares over the ranks that hold parts of the same rows, columns or matrices."""
        yield from all_reduce(self._of_tensor, self._groups.tensor)
        yield from all_reduce(self._of_data, self._groups.data)

    def bytes_sent(self) -> Counter[str]:
        """Bytes for other ranks in a step, by group."""
        return Counter(
            tensor=ring_bytes(self._of_tensor.nbytes, self._grid.tensor_parallel_size),
            data=ring_bytes(self._of_data.nbytes, self._grid.data_parallel_size),
        )
