"""How many ranks share what, and which of them share a node."""

from dataclasses import dataclass

from megatron_dion_tools.plan.divisors import check_divides


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other, `stride` apart in Megatron's order.

    Attributes:
        size: number of ranks.
        stride: distance of neighbours.
        ranks_per_node: GPUs of a node.
    """

    size: int
    stride: int
    ranks_per_node: int

    @property
    def per_node(self) -> int:
        """How many ranks of the group share a node."""
        return min(self.size, max(1, self.ranks_per_node // self.stride))

    @property
    def leaving(self) -> float:
        """The share of a ring's traffic that goes to another node, averaged over the ranks."""
        return 0.0 if self.per_node == self.size else 1 / self.per_node


@dataclass(frozen=True)
class Topology:
    """Parallel sizes of a run; names are short for those of Megatron's flags.

    Ranks are put on nodes in Megatron's default order, tp-cp-ep-dp-pp: tensor-parallel neighbours
    first, pipeline stages last (MC/parallel_state.py).

    Attributes:
        tp: tensor-parallel size; with more than one, sequence parallelism too.
        pp: pipeline stages, without interleaving.
        dp: data-parallel size, of all instances together, experts' ranks included.
        cp: context-parallel size.
        ep: expert-parallel size; experts have the tensor-parallel size of other weights.
        instances: distributed-optimizer instances.
        account_for_ends: see `GptShape.stage_layers`.
        ranks_per_node: GPUs of a node.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    instances: int = 1
    account_for_ends: bool = False
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "cp", "ep", "instances"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is not positive")
        check_divides("--instances", self.instances, self.dp, f"--dp {self.dp}")
        # Experts have ranks of the data-parallel groups.
        share = self.replicated // self.instances
        words = f"--dp {self.dp} x --cp {self.cp} / --instances {self.instances}"
        check_divides("--ep", self.ep, share, words)

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.replicated

    @property
    def replicated(self) -> int:
        """Ranks with the same dense weights, data-parallel x context-parallel ones."""
        return self.dp * self.cp

    @property
    def tensor(self) -> Group:
        return self._group(self.tp, 1)

    @property
    def context(self) -> Group:
        return self._group(self.cp, self.tp)

    @property
    def expert(self) -> Group:
        return self._group(self.ep, self.tp)

    @property
    def pipeline(self) -> Group:
        return self._group(self.pp, self.tp * self.replicated)

    def data(self, experts: bool = False) -> Group:
        """The ranks over which one instance cuts a buffer of dense weights or of experts."""
        ep = self.ep if experts else 1
        return self._group(self.replicated // (ep * self.instances), self.tp * ep)

    @property
    def replicas(self) -> Group:
        """The same piece in all instances."""
        return self._group(self.instances, self.tp * self.replicated // self.instances)

    def _group(self, size: int, stride: int) -> Group:
        return Group(size, stride, self.ranks_per_node)


@dataclass(frozen=True)
class Batch:
    """What a step sees.

    Attributes:
        micro: sequences of a micro batch.
        global_: sequences of a step over all ranks.
        recompute: `none`, `selective` (attention) or `full` recomputation of activations.
    """

    micro: int = 1
    global_: int = 1
    recompute: str = "selective"

    def micro_batches(self, topology: Topology) -> int:
        """Micro batches of a step on each rank.

        Raises:
            ValueError: the batch cannot be divided evenly.
        """
        share = self.micro * topology.dp
        if self.global_ % share:
            enough = -(-self.global_ // share) * share
            raise ValueError(
                f"--global-batch-size {self.global_} is no multiple of --micro-batch-size"
                f" {self.micro} x --dp {topology.dp}: take {enough}, or another of these"
            )
        return self.global_ // share
