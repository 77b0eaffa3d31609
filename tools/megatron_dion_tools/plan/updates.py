"""What an optimizer of matrices keeps, computes and sends on a rank: AdamW, and Megatron's Muon."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_dion.sharding.matrices import Weight
from megatron_dion_tools.plan.stage import Stage, numel_of
from megatron_dion_tools.plan.topology import Group

ADAMW_BYTES = 46
"""Bytes that AdamW reads and writes of an element, an estimate.

Gradient (norm, clipping, update) 4 + 8 + 4, moments 16, master 8, model's weight 6.
"""

LAUNCH_NUMBERS = 320 * 65536
"""Numbers of float32 that a kernel over many tensors changes at most."""
_MUON_LAUNCHES = 25
"""Of a matrix: three products in each of five iterations, and what is before and after them."""


@dataclass(frozen=True)
class Collective:
    """What the rank that sends most sends in a step in one kind of collective.

    Attributes:
        name: of the kind; `~` at its end marks an estimate, with which no run was compared.
        group: the ranks that take part.
        bytes: sent to others.
        calls: number of calls.
        when: `backward` and `forward` can be hidden behind the model's work, `layer` is in its way,
            `step` is in the optimizer's.
        to_peers: as for `Group.leaving`.
    """

    name: str
    group: Group
    bytes: float
    calls: int
    when: str = "step"
    to_peers: bool = False

    @property
    def network(self) -> float:
        """Those bytes that leave the node."""
        return self.bytes * self.group.leaving(self.to_peers)


@dataclass(frozen=True)
class Update:
    """An optimizer's part in a step, on the rank with most of each.

    Attributes:
        elements: of matrices whose masters and momenta a rank has.
        memory: bytes of optimizer state and buffers by kind.
        bytes_passed: bytes that are read and written element by element, an estimate.
        products: operations of products in the optimizer's precision, 2 m n k each.
        float32_products: operations of products that are float32 in any case.
        factorizations: operations of Cholesky factorizations.
        launches: kernels that are started, about.
        collectives: what is sent within the step, besides Megatron's own.
    """

    elements: float
    memory: dict[str, float]
    bytes_passed: float
    products: float = 0.0
    float32_products: float = 0.0
    factorizations: float = 0.0
    launches: float = 0.0
    collectives: list[Collective] = field(default_factory=list)


def adamw(stage: Stage) -> Update:
    """AdamW over the distributed optimizer."""
    elements = stage.matrices / stage.group.size
    launches = 1 + -(-elements // LAUNCH_NUMBERS)
    return Update(elements, {"momenta": 8 * elements}, ADAMW_BYTES * elements, launches=launches)


def muon(stage: Stage) -> Update:
    """Megatron's Muon, layer-wise distributed: a rank owns whole weights.

    They are dealt out by size, to the first rank up to the last and from the last down to the
    first (MC/optimizer/layer_wise_optimizer.py:651). With `duplicated` the tensor-parallel ranks
    gather each of them, and all do the same work.
    """
    ranks, tensor = stage.group.size, stage.run.topology.group("tensor")
    is_gathered = stage.run.optimizer.muon_tp_mode == "duplicated" and tensor.size > 1
    turns = [*range(ranks), *reversed(range(ranks))]
    elements: defaultdict[int, int] = defaultdict(int)
    products: defaultdict[int, int] = defaultdict(int)
    launches: defaultdict[int, int] = defaultdict(int)
    for number, weight in enumerate(sorted(stage.weights, key=numel_of)):
        owner = turns[number % len(turns)]
        elements[owner] += numel_of(weight)
        matrices = list(muon_matrices(weight, is_gathered))
        products[owner] += sum(newton_schulz(*each) for each in matrices)
        launches[owner] += _MUON_LAUNCHES * len(matrices)
    most = max(elements.values())
    gathered = 4 * (tensor.size - 1) * most * is_gathered
    calls = -(-len(stage.weights) // ranks)
    return Update(
        most,
        {"momenta": 4 * most},
        # Momentum, Nesterov's combination, input and output of the iteration, decay and update.
        bytes_passed=62 * most,
        products=max(products.values()),
        launches=max(launches.values()),
        collectives=[Collective("muon gathers", tensor, gathered, calls)],
    )


def newton_schulz(rows: int, columns: int, steps: int = 5) -> int:
    """Operations of Muon's iterations of a matrix, on its smaller side."""
    small, large = sorted((rows, columns))
    return steps * (4 * small**2 * large + 2 * small**3)


def muon_matrices(weight: Weight, is_gathered: bool) -> Iterator[tuple[int, int]]:
    """What Megatron's Muon takes for matrices: query, key, value, and any other weight whole."""
    rows, columns = weight.rows, weight.columns
    if is_gathered:
        rows, columns = weight.global_rows, weight.global_columns
    is_qkv = weight.name.endswith("linear_qkv.weight")
    parts = [part.rows for part in weight.parts] if is_qkv else [1]
    for part in parts:
        yield rows * part // sum(parts), columns
