"""How many ranks share what, and which of them share a node."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dion_tools.plan.models import GptShape, check_divides, divisors


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other, of which `per_node` share a node."""

    link: str
    size: int
    per_node: int

    def leaving(self, to_peers: bool) -> float:
        """The share of what a rank sends that leaves its node, averaged over the ranks.

        Args:
            to_peers: whether it goes to all others alike, and not around a ring.
        """
        if to_peers:
            return (self.size - self.per_node) / max(self.size - 1, 1)
        return 0.0 if self.per_node == self.size else 1 / self.per_node


@dataclass(frozen=True)
class Topology:
    """Parallel sizes of a run; names are short for those of Megatron's flags.

    Ranks are put on nodes in Megatron's default order, tp-cp-dp-pp: tensor-parallel neighbours
    first, pipeline stages last (MC/parallel_state.py). Tensor parallelism is with sequence
    parallelism, the pipeline without interleaving.

    Attributes:
        dp: data-parallel size, of all instances together.
        instances: distributed-optimizer instances.
        ranks_per_node: GPUs of a node.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    instances: int = 1
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        check_divides("--instances", self.instances, self.dp, f"--dp {self.dp}")

    @property
    def replicated(self) -> int:
        """Ranks with the same weights, data-parallel x context-parallel ones."""
        return self.dp * self.cp

    def group(self, link: str) -> Group:
        """The ranks that a link joins.

        Args:
            link: `tensor`, `context`, `pipeline`, `data` (the ranks over which one instance cuts a
                buffer) or `replicas` (the same piece in all instances).
        """
        size, stride = {
            "tensor": (self.tp, 1),
            "context": (self.cp, self.tp),
            "pipeline": (self.pp, self.tp * self.replicated),
            "data": (self.replicated // self.instances, self.tp),
            "replicas": (self.instances, self.tp * self.replicated // self.instances),
        }[link]
        return Group(link, size, min(size, max(1, self.ranks_per_node // stride)))


def topologies(shape: GptShape, ranks: int, ranks_per_node: int) -> Iterator[Topology]:
    """All topologies whose sizes multiply to a number of ranks.

    Tensor parallelism stays within a node; context parallelism is in powers of two and leaves a
    rank 4096 tokens.
    """
    contexts = [cp for cp in (1, 2, 4, 8, 16) if cp == 1 or shape.sequence // cp >= 4096]
    for tp in divisors(ranks_per_node):
        for pp in range(1, shape.layers + 1):
            for cp in contexts:
                dp, rest = divmod(ranks, tp * pp * cp)
                if rest == 0:
                    yield Topology(tp, pp, dp, cp, 1, ranks_per_node)
