"""Bytes that each rank of a pipeline stage keeps, by what they are."""

import numpy as np
import torch
from torch import Tensor

from megatron_dion.algorithm import IN_FLIGHT
from megatron_dion.sharding import TORCH_DTYPES, Rank
from megatron_dion.sharding.bounds import bound_of_buffers
from megatron_dion.sharding.memory import peak_bytes
from megatron_dion_tools.plan.holdings import Counts, holdings
from megatron_dion_tools.plan.rounding import copied_bytes
from megatron_dion_tools.plan.stage import DionPart, Stage, of_all

KINDS = (
    *("weights", "gradients", "masters", "momenta", "right factors", "exchange", "scalars"),
    "bf16 copies",
)
_FLOAT32 = 4


def memory(stage: Stage) -> dict[str, Counts]:
    """Bytes by kind on each rank (D, T) of one instance of the data-parallel grid.

    * `weights` and `gradients` (float32): Megatron's buffers with their padding.
    * `masters`: float32 copies of a rank's own matrices; none where weights are fp32 already.
    * `momenta`: of matrices, with AdamW their second moments too.
    * `right factors`, `exchange`: Dion's. What is exchanged is the figure of `exchange`, on all.
    * `scalars`: masters and moments of all that is no matrix of the optimizer's.
    * `bf16 copies`: of Dion's products in `medium`, of the block with most of them.
    """
    run = stage.run
    shape = run.topology.data().size, run.topology.tp
    found = {name: np.zeros(shape, np.int64) for name in KINDS}
    master = 0 if run.weight_bytes == _FLOAT32 else _FLOAT32
    momentum = {"adamw": 2 * _FLOAT32, "muon": _FLOAT32, "dion": 0}[run.optimizer.kind]
    for section in stage.sections:
        matrices = section.held(stage.is_matrix)[:, None]
        others = section.held(lambda p: not stage.is_matrix(p))[:, None]
        found["weights"] += section.buffer.numel * run.weight_bytes
        found["gradients"] += section.buffer.numel * _FLOAT32
        found["masters"] += of_all(master * matrices, shape)
        found["momenta"] += of_all(momentum * matrices, shape)
        found["scalars"] += of_all((master + 2 * _FLOAT32) * others, shape)
    for part in stage.dion_parts:
        momenta, factors = dion_state(part)
        found["momenta"] += of_all(momenta, shape)
        found["right factors"] += of_all(factors, shape)
        found["exchange"] += exchange(part)
        copies = of_all(bf16_copies(part), shape)
        found["bf16 copies"] = np.maximum(found["bf16 copies"], copies)
    return found


def dion_state(part: DionPart) -> tuple[Counts, Counts]:
    """Bytes of momenta and of right factors on each rank of a Dion optimizer's grid (D, T)."""
    layout = part.planner.layout
    shape = layout.grid.data_parallel_size, layout.grid.tensor_parallel_size
    momenta, factors = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for holding in holdings(layout):
        momenta += TORCH_DTYPES[layout.config.momentum_dtype].itemsize * holding.elements
        factors += TORCH_DTYPES[layout.config.factor_dtype].itemsize * holding.rows * holding.kept
    return momenta, factors


def bf16_copies(part: DionPart) -> Counts:
    """The most bytes that a product copies at a time on each rank (D, T).

    What a rank has of a matrix counts as one block: rows that are cut are blocks of their own.
    """
    layout = part.planner.layout
    most = np.zeros((layout.grid.data_parallel_size, layout.grid.tensor_parallel_size), np.int64)
    if layout.config.fp32_matmul_prec != "medium":
        return most
    for holding in holdings(layout):
        columns = layout.placement(holding.matrix).weight.columns
        rank = layout.matrices[holding.matrix].rank
        copies = copied_bytes(holding.elements, holding.rows, columns, rank)
        most = np.maximum(most, np.where(holding.elements > 0, copies, 0))
    return most


def exchange(part: DionPart, most: int = 8) -> int:
    """Bytes of Dion's exchange buffers at their peak, the most that a rank has.

    Args:
        part: the optimizer.
        most: ranks that are planned, those of which a bound is largest: planning every rank of a
            large grid would take too long. Of others, what is returned may be less than they have,
            but by no more than their bound is above it.
    """
    size = part.planner.layout.grid.tensor_parallel_size
    bounds = _bounds(part).flatten()
    found = 0
    for place in bounds.argsort(descending=True)[:most].tolist():
        if bounds[place] <= found:
            break
        found = max(found, _exchange_on(part, Rank(place % size, place // size)))
    return found


def _bounds(part: DionPart) -> Tensor:
    """What the buffers of no rank exceed (D, T)."""
    planner = part.planner
    sets = [bound_of_buffers(planner, i, replicas) for i, replicas in enumerate(part.replicas)]
    under_way = min(len(sets), IN_FLIGHT)
    return torch.stack(sets).topk(under_way, dim=0).values.sum(dim=0)


def _exchange_on(part: DionPart, rank: Rank) -> int:
    """The sets that are under way at a time have buffers at a time."""
    plans = part.planner.plans(rank)
    peaks = [peak_bytes(plan, n) for plan, n in zip(plans, part.replicas, strict=True)]
    return sum(sorted(peaks)[-IN_FLIGHT:])
