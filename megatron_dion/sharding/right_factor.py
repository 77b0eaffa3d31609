"""Rows of R and Q that several ranks hold: sums of R, and the stored columns of Q."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_dion.algorithm.exchange import Steps
from megatron_dion.algorithm.step import copy_all, views_in
from megatron_dion.sharding.buffers import Buffers
from megatron_dion.sharding.collectives import (
    TORCH_DTYPES,
    Setup,
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
    ring_bytes,
)


class RightFactorExchange:
    """The R of a step. Its memory holds the completed Q until R is computed.

    `memory` is for what lasts from the first product to the last, `transit` for what a single
    collective needs. `of_rectangles` are the rows of R, (rows, r), of each rectangle of the plan.
    """

    def __init__(self, setup: Setup, memory: Buffers, transit: Buffers) -> None:
        plan, groups, replicas, wire, _ = setup
        self._groups = groups
        self._replicas = replicas
        self._transit = transit
        self._wire = wire
        self._tensor_size = tensor_size = plan.layout.grid.tensor_parallel_size
        shapes, order, partial = [], [], 0
        for index, (placement, rectangle) in enumerate(plan.rectangles):
            shape = torch.Size((rectangle.rows, plan.layout.matrices[rectangle.matrix].rank))
            is_shared = plan.layout.shares_rows(placement)
            shapes.append(shape)
            order.append((not is_shared, shape[1], shape[0], index))
            partial += shape.numel() if is_shared else 0
        order.sort()  # first those with partial sums, and of these equal shapes side by side
        # Padded at its start, what tensor-parallel ranks sum is divisible into equal shares.
        padding = -partial % tensor_size if replicas > 1 else 0
        rows = memory.empty(padding + sum(shape.numel() for shape in shapes), torch.float32)
        views = views_in(rows[padding:], [shapes[index] for *_, index in order])
        places = {index: view for (*_, index), view in zip(order, views, strict=True)}
        self.of_rectangles = [places[index] for index in range(len(shapes))]
        self._partial, self._other = rows[: padding + partial], rows[padding + partial :]
        is_cast = wire != torch.float32
        largest = max(len(self._partial), len(self._other) if replicas > 1 else 0)
        self._sent = transit.empty(largest if is_cast else 0, wire)
        part = len(self._partial) // tensor_size if replicas > 1 else 0
        self._part = transit.empty(part, wire)
        self._has_partial_rows = plan.has_partial_rows
        self._cut_rows = _CutRows(setup, self.of_rectangles, transit)
        self._stored_columns = _StoredColumns(setup, self.of_rectangles, transit)

    def gather(self) -> Steps:
        """Completes the rows of Q of which each tensor-parallel rank stores some columns."""
        with self._transit.allocated():
            yield from self._stored_columns.gather()

    def sum(self) -> Steps:
        """Sums R over the ranks that hold its columns, and takes the mean over replicas."""
        with self._transit.allocated():
            if self._replicas == 1:
                with self._as_sent(self._partial) as sent:
                    yield from all_reduce(sent, self._groups.tensor)
            else:
                yield from self._average()
            # Last, so that the copies of a row have the same bits.
            yield from self._cut_rows.sum()

    def bytes_sent(self) -> Counter[str]:
        """Bytes for other ranks in a step, by group."""
        size = self._wire.itemsize
        averaged = len(self._part) + len(self._other)
        return Counter(
            tensor=ring_bytes(size * len(self._partial), self._tensor_size)
            + self._stored_columns.bytes_sent,
            data=self._cut_rows.bytes_sent,
            replicas=ring_bytes(size * averaged, self._replicas),
        )

    def _average(self) -> Steps:
        tensor, replicas = self._groups.tensor, self._groups.replicas
        if self._has_partial_rows:
            # Each tensor-parallel rank averages a part of the sum over replicas.
            with self._as_sent(self._partial) as sent:
                yield from reduce_scatter(self._part, sent, tensor)
                yield from all_reduce(self._part, replicas)
                yield from all_gather(sent, self._part, tensor)
        with self._as_sent(self._other) as sent:
            yield from all_reduce(sent, replicas)
        self._partial /= self._replicas
        self._other /= self._replicas

    @contextmanager
    def _as_sent(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows in the type in which they travel, copied back in the end."""
        if not len(self._sent):
            yield rows
            return
        sent = self._sent[: len(rows)]
        sent.copy_(rows)
        yield sent
        rows.copy_(sent)


class _StoredColumns:
    """The columns of Q that tensor-parallel ranks store of the rows that they share."""

    def __init__(self, setup: Setup, projections: Sequence[Tensor], transit: Buffers) -> None:
        plan, layout = setup.plan, setup.plan.layout
        self._group = setup.groups.tensor
        self._is_needed = plan.has_partial_rows
        peers = layout.grid.tensor_group(plan.rank.data_parallel) if self._is_needed else []
        self._of_peers: list[list[Tensor]] = [[] for _ in peers]
        for (placement, _), rows in zip(plan.rectangles, projections, strict=True):
            if layout.shares_rows(placement):
                for views, peer in zip(self._of_peers, peers, strict=True):
                    views.append(rows[:, layout.tensor_slice(placement, rows.shape[1], peer)])
        # Ranks store numbers of columns that differ by one at most; all_gather needs equal sizes.
        size = max((sum(v.numel() for v in views) for views in self._of_peers), default=0)
        dtype = TORCH_DTYPES[layout.config.factor_dtype]
        self._sent = transit.empty(size, dtype)
        self._received = transit.empty(size * len(peers), dtype)
        self.bytes_sent = self._sent.nbytes * max(len(peers) - 1, 0)
        self._mine = self._of_peers[plan.rank.tensor_parallel] if peers else []
        self._place = views_in(self._sent, [view.shape for view in self._mine])
        self._places = [
            views_in(self._received[i * size : (i + 1) * size], [view.shape for view in views])
            for i, views in enumerate(self._of_peers)
        ]

    def gather(self) -> Steps:
        if not self._is_needed:
            return
        copy_all(self._place, self._mine)
        yield from all_gather(self._received, self._sent, self._group)
        for views, places in zip(self._of_peers, self._places, strict=True):
            if views is not self._mine:
                copy_all(views, places)


class _CutRows:
    """Sums of the rows of R whose columns lie on several data-parallel ranks.

    Every holder adds up all parts in the order of the ranks, so the copies of a row are equal to
    the last bit.
    """

    def __init__(self, setup: Setup, projections: Sequence[Tensor], transit: Buffers) -> None:
        plan, groups, _, wire, _ = setup
        self._group = groups.data
        self._is_needed = plan.has_cut_rows
        row_of = {
            (rectangle.matrix, rectangle.row_start): rows[0]  # (r,)
            for (_, rectangle), rows in zip(plan.rectangles, projections, strict=True)
            if rectangle.cut
        }
        self._parts = [[row_of[row] for row in rows] for rows in plan.cut_rows]  # by peer
        self._sizes = [sum(view.numel() for view in views) for views in self._parts]
        self._outgoing = [view for views in self._parts for view in views]
        shapes = [view.shape for view in self._outgoing]
        self._sent = transit.empty(sum(self._sizes), wire)
        self._received = transit.empty(sum(self._sizes), wire)
        self.bytes_sent = self._sent.nbytes
        self._sent_views = views_in(self._sent, shapes)
        arriving = iter(views_in(self._received, shapes))
        arrivals = [[next(arriving) for _ in views] for views in self._parts]
        # This rank's own part of a row is added in its turn, as it was sent.
        copies = {id(v): copy for v, copy in zip(self._outgoing, self._sent_views, strict=True)}
        self._mine = list({id(view): view for view in self._outgoing}.values())
        self._parts[plan.rank.data_parallel] = self._mine
        arrivals[plan.rank.data_parallel] = [copies[id(view)] for view in self._mine]
        self._arrivals = arrivals

    def sum(self) -> Steps:
        if not self._is_needed:
            return
        copy_all(self._sent_views, self._outgoing)
        yield from all_to_all(self._received, self._sent, self._sizes, self._sizes, self._group)
        if self._mine:
            torch._foreach_zero_(self._mine)
        for views, arrivals in zip(self._parts, self._arrivals, strict=True):
            if views:
                torch._foreach_add_(views, arrivals)
