"""Floating-point operations of a step: of the optimizer's on every rank, and of the model's.

Products are counted as 2 m n k. Factorizations by their textbook formulas (Golub and Van Loan): QR
of (n, r) without its Q 2 n r^2 - 2/3 r^3 and as much again for Q, Cholesky r^3 / 3, a triangular
solve of n rows n r^2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dion.algorithm import DionConfig
from megatron_dion.algorithm.orthonormalize import (
    INVERTED_AT_ONCE,
    ONCE,
    PROBES,
    sketch_rows,
    sure_method,
    usual_method,
)
from megatron_dion.sharding import Rank
from megatron_dion_tools.plan.holdings import holdings
from megatron_dion_tools.plan.models import Parameter
from megatron_dion_tools.plan.rounding import BYTES_PASSED
from megatron_dion_tools.plan.stage import DionPart, Section, Stage, of_all
from megatron_dion_tools.plan.topology import Batch

Operations = NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What the optimizer of each rank does in a step; figures (D, T).

    Attributes:
        products: operations of matrix products in the optimizer's precision.
        float32_products: of those that orthonormalize, which are float32 in any case.
        factorizations: operations of QR and Cholesky factorizations and triangular solves.
        passes: bytes that are read and written element by element.
    """

    products: Operations
    float32_products: Operations
    factorizations: Operations
    passes: Operations

    @property
    def operations(self) -> Operations:
        return self.products + self.float32_products + self.factorizations


def optimizer_work(stage: Stage, device: str = "cuda") -> Work:
    """Operations of products and factorizations are counts; bytes of passes are an estimate.

    Of an element of AdamW 46 bytes: gradient (norm, clipping, update) 4 + 8 + 4, moments 16, master
    8, model's weight 6. Of Dion's matrices 58: the gradient is checked and added to the momentum,
    and B read by two products and changed by a third; with bf16 operands more (`BYTES_PASSED`). Of
    Muon's 62: momentum, Nesterov's combination, input and output of the iteration, weight decay and
    update.
    """
    shape = stage.run.topology.data().size, stage.run.topology.tp
    products, float32_products, factorizations, passes = (np.zeros(shape) for _ in range(4))
    optimizer = stage.run.optimizer
    per_element = {"adamw": 46, "muon": 62, "dion": 58}[optimizer.kind]
    if optimizer.kind == "dion" and optimizer.precision == "medium":
        per_element += BYTES_PASSED
    for section in stage.sections:
        matrices = section.held(stage.is_matrix)[:, None]
        others = section.held(lambda p: not stage.is_matrix(p))[:, None]
        passes += of_all(per_element * matrices + 46 * others, shape)
        if stage.run.optimizer.kind == "muon":
            products += of_all(_newton_schulz_of_owners(stage, section), shape)
    for part in stage.dion_parts:
        found = dion_operations(part, device)
        for total, its in zip((products, float32_products, factorizations), found, strict=True):
            total += of_all(its, shape)
    return Work(products, float32_products, factorizations, passes)


def dion_operations(
    part: DionPart, device: str = "cuda"
) -> tuple[Operations, Operations, Operations]:
    """Operations of a Dion optimizer on each of its ranks (D, T).

    Of its products with B, M and W, of those that orthonormalize, and of factorizations.

    Where `auto` tries one Cholesky QR it is taken to succeed, which it does where the columns of P
    are nearly orthogonal. With the right factor `orth`, shares of rows that several ranks have are
    taken as equal.

    Args:
        part: the optimizer.
        device: type of the device, which decides what orthonormalizer `auto` is.
    """
    layout, config = part.planner.layout, part.planner.layout.config
    shape = layout.grid.data_parallel_size, layout.grid.tensor_parallel_size
    products, float32_products, factorizations = (np.zeros(shape) for _ in range(3))
    for holding in holdings(layout):
        rank = layout.matrices[holding.matrix].rank
        products += 4 * rank * (holding.multiplied + holding.elements)
        if config.right_factor == "orth":
            shares = shape[1] if holding.is_partial else 1
            float32_products += 2 * rank**2 * (holding.rows / shares + holding.rows)
            factorizations += 4 / 3 * rank**3 * (holding.rows > 0)

    def usual(rows: float, rank: int) -> str:
        return usual_method(config.orthonormalizer, int(rows), rank, device)

    def add(ranks: Sequence[Rank], found: tuple[Operations, Operations]) -> None:
        where = tuple(np.array([(rank.data_parallel, rank.tensor_parallel) for rank in ranks]).T)
        np.add.at(float32_products, where, found[0])
        np.add.at(factorizations, where, found[1])

    for k, charges in part.planner.charges.items():
        rank, owner = layout.matrices[k].rank, part.planner.owners.get(k)
        rows = np.array([charge.stop - charge.start for charge in charges], float)
        ranks = [charge.rank for charge in charges]
        if owner is None:
            method = layout.part_method(k) if len(charges) > 1 else usual(rows[0], rank)
            add(ranks, orthonormalization(config, rows, rank, method, device))
            continue
        method = sure_method(config.orthonormalizer, device)
        width = min(int(rows[0]), rank)  # sections are of equal size
        own, qr = orthonormalization(config, rows, width, method, device)
        apply = 2 * rows * width * rank
        if method == "qr":
            qr = qr + 2 * width**2 * (rank - width)
        else:  # makes the triangle by a product
            own = own + 2 * rows * width * rank
        add(ranks, (own + apply, qr))
        stack = np.array([width * len(charges)], float)
        add([owner], orthonormalization(config, stack, rank, usual(stack[0], rank), device))
    return products, float32_products, factorizations


def orthonormalization(
    config: DionConfig, rows: Operations, rank: int, method: str, device: str = "cuda"
) -> tuple[Operations, Operations]:
    """Operations of products and of factorizations to orthonormalize rows of P, (rows, rank).

    Args:
        config: gives the size of sketches.
        rows: any number of them, each on a rank of its own.
        rank: r.
        method: one of `usual_method`'s.
        device: as for `dion_operations`.
    """
    if method == "qr":
        return 0 * rows, 4 * rows * rank**2 - 4 / 3 * rank**3
    if method == ONCE:
        by_products, by_solves = _inverse(rank, device)
        return 4 * rows * rank**2 + by_products, 0 * rows + rank**3 / 3 + by_solves
    probes = 2 * 2 * rows * rank * PROBES
    gram, solve, cholesky = 2 * rows * rank**2, rows * rank**2, rank**3 / 3
    if method == "cqr":
        return 2 * gram + probes, 2 * (cholesky + solve)
    sketch = sketch_rows(rank, config.oversample)
    triangle = 2 * sketch * rank**2 - 2 / 3 * rank**3
    products = 2 * sketch * rows * rank + gram + probes
    return products, triangle + cholesky + 2 * solve


def _inverse(size: int, device: str) -> tuple[int, int]:
    """Operations of products and of solves to invert a triangle."""
    if size <= INVERTED_AT_ONCE or device != "cpu":
        return 0, size**3
    half, rest = size // 2, size - size // 2
    (first, one), (last, other) = _inverse(half, device), _inverse(rest, device)
    return first + last + 2 * half * rest * size, one + other


def newton_schulz(rows: int, columns: int, steps: int) -> int:
    """Operations of Muon's iterations of a matrix, on its smaller side."""
    small, large = sorted((rows, columns))
    return steps * (4 * small**2 * large + 2 * small**3)


def _newton_schulz_of_owners(stage: Stage, section: Section) -> Operations:
    """(ranks, 1) over the ranks of the section's group."""
    found = np.zeros((section.group.size, 1))
    for parameter, owner in section.owners():
        if stage.is_matrix(parameter):
            for rows, columns in _muon_matrices(parameter, stage):
                found[owner] += newton_schulz(rows, columns, stage.run.optimizer.muon_steps)
    return found


def _muon_matrices(parameter: Parameter, stage: Stage) -> Iterator[tuple[int, int]]:
    """What Megatron's Muon takes for matrices: query, key, value, and any other weight whole."""
    rows, columns = parameter.shape
    weight = parameter.weight
    times = (1, 1)
    if weight is not None and stage.run.optimizer.muon_tp_mode == "duplicated":
        size = weight.tensor_parallel_size
        times = (size if weight.partition_dim == 0 else 1, size if weight.partition_dim == 1 else 1)
    if weight is None or not parameter.name.endswith("linear_qkv.weight"):
        yield rows * times[0], columns * times[1]
        return
    period = sum(part.rows for part in weight.parts)
    for part in weight.parts:
        yield rows * part.rows // period * times[0], columns * times[1]


@dataclass(frozen=True)
class ModelWork:
    """Operations of a micro batch on a rank of a stage.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, with what is computed again.
    """

    forward: float
    backward: float


def model_work(stage: Stage, batch: Batch) -> ModelWork:
    """Products with weights, 2 per element and token, and causal attention, half of all pairs.

    Backward twice as much; attention once more with `selective` recomputation, all layers with
    `full`. Experts get as many tokens each.
    """
    shape, topology = stage.run.shape, stage.run.topology
    tokens = shape.sequence // topology.cp * batch.micro
    dense = sum(p.numel for p in stage.parameters if p.weight is not None and not p.is_expert)
    products = 2.0 * tokens * dense
    if shape.experts is not None:
        experts = sum(p.numel for p in stage.parameters if p.is_expert and p.weight is not None)
        here = shape.experts.count // topology.ep
        products += 2.0 * tokens * shape.experts.top_k * experts / here
        # Routers see a tensor-parallel rank's part of the sequence.
        routers = sum(map(shape.has_experts, stage.layers)) * shape.experts.count * shape.hidden
        products += 2.0 * tokens / topology.tp * routers
    width = shape.heads * shape.head // topology.tp
    attention = 2.0 * shape.sequence * tokens * width * len(stage.layers)
    layers, logits = products + attention, 0.0
    if stage.is_last:
        rows = shape.padded_vocab(topology.tp) // topology.tp
        logits = 2.0 * tokens * rows * shape.hidden
    again = {"none": 0.0, "selective": attention, "full": layers}[batch.recompute]
    return ModelWork(layers + logits, 2 * (layers + logits) + again)


def activation_bytes(stage: Stage, batch: Batch) -> float:
    """An estimate of a rank's activations at their peak, in bytes.

    After Korthikanti et al. (arXiv 2205.05198, table 2): of a layer and micro batch with bf16 and
    sequence parallelism (18 h + 4 ffn, with a gate 6 ffn) bytes per token over tensor-parallel
    ranks, attention scores not kept; with `full` recomputation 2 h, and one layer's at a time.
    Without any, 5 bytes per score besides. As many micro batches as 1F1B has in flight; float32
    logits and their gradient in the last stage.
    """
    shape, topology = stage.run.shape, stage.run.topology
    tokens = shape.sequence // topology.cp * batch.micro / topology.tp
    gate = 6 if shape.gated else 4
    width = 2 * stage.run.weight_bytes // 4 or 1
    in_flight = min(batch.micro_batches(topology), topology.pp - stage.index)
    per_layer = []
    for layer in stage.layers:
        ffn = shape.ffn
        if shape.experts is not None and shape.has_experts(layer):
            ffn = shape.experts.top_k * shape.experts.ffn + shape.experts.shared_ffn
        numbers = 18 * shape.hidden + gate * ffn
        if batch.recompute == "none":
            numbers += 5 * shape.heads * shape.sequence
        per_layer.append(numbers)
    if batch.recompute == "full":
        kept = in_flight * 2 * shape.hidden * len(per_layer) + max(per_layer, default=0)
    else:
        kept = in_flight * sum(per_layer)
    logits = 8 * shape.padded_vocab(topology.tp) * stage.is_last
    return tokens * (kept * width + logits)
