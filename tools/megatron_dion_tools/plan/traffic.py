"""Bytes that each rank of a pipeline stage sends in a step, by collective and by link.

Sent bytes are those of a ring: of N bytes in a group of k, a reduce-scatter or all-gather sends
N (k - 1) / k and an all-reduce twice that. Of a ring over nodes with p ranks of the group each, one
of p ranks sends to another node; averaged over the ranks, that is what is counted as network.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dion.algorithm.count_sketch import BUCKETS
from megatron_dion.algorithm.orthonormalize import summed_rows
from megatron_dion.sharding import TORCH_DTYPES
from megatron_dion.sharding.traffic import in_shares, ring_bytes
from megatron_dion_tools.plan.holdings import Counts, holdings, shared_row_numbers
from megatron_dion_tools.plan.loads import count_hops
from megatron_dion_tools.plan.stage import DionPart, Stage, of_all
from megatron_dion_tools.plan.topology import Batch, Group


@dataclass(frozen=True)
class Sent:
    """What each rank sends in one kind of collective; figures for all ranks, or (D, T).

    Attributes:
        bytes: sent to others.
        network: those of them that leave the node, averaged over a node's ranks.
        calls: number of calls.
        when: `backward` and `forward` can be hidden behind the model's work, `layer` is in its way,
            `step` is in the optimizer's.
        is_estimate: whether no run was compared with it, or it supposes an even use of experts.
    """

    bytes: Counts | int
    network: NDArray[Any] | float
    calls: int
    when: str
    is_estimate: bool = False

    @property
    def busiest(self) -> int:
        return int(np.max(self.bytes))

    @property
    def mean(self) -> float:
        return float(np.mean(self.bytes))

    def plus(self, other: "Sent") -> "Sent":
        """Both together."""
        return replace(
            self,
            bytes=self.bytes + other.bytes,
            network=self.network + other.network,
            calls=self.calls + other.calls,
        )


Traffic = dict[str, Sent]


def ring(group: Group, sent: int, calls: int, when: str, is_estimate: bool = False) -> Sent:
    """What goes around a ring, the same on every rank."""
    return Sent(sent, sent * group.leaving, calls, when, is_estimate)


def to_peers(group: Group, sent: int, calls: int, when: str, is_estimate: bool = False) -> Sent:
    """What goes to all others of a group alike, or from one to the next of a group of stages."""
    others = max(group.size - 1, 1)
    return Sent(sent, sent * (group.size - group.per_node) / others, calls, when, is_estimate)


def traffic(stage: Stage, batch: Batch) -> Traffic:
    """All collectives of a step on the ranks of a stage; those without bytes are left out."""
    found = {
        **gradients_and_weights(stage),
        **activations(stage, batch),
        **muon_traffic(stage),
    }
    for part in stage.dion_parts:
        for name, sent in dion_traffic(part, stage).items():
            found[name] = found[name].plus(sent) if name in found else sent
    return {name: sent for name, sent in found.items() if np.any(sent.bytes)}


def gradients_and_weights(stage: Stage) -> Traffic:
    """Megatron's own: gradients are reduced, updated weights gathered."""
    found: Traffic = {}
    times = _gathers(stage)

    def add(name: str, group: Group, numbers: int, calls: int, when: str) -> None:
        sent = ring(group, numbers, calls, when)
        found[name] = found[name].plus(sent) if name in found else sent

    for section in stage.sections:
        ranks, buckets = section.group.size, section.buffer.buckets
        gradients = sum(_share(4 * bucket, ranks) for bucket in buckets)
        weights = sum(_share(stage.run.weight_bytes * bucket, ranks) for bucket in buckets)
        whole = section.is_reduced_whole
        name = "gradients all-reduce" if whole else "gradients reduce-scatter"
        add(name, section.group, gradients * (2 if whole else 1), len(buckets), "backward")
        # A ring, in the mean, where shards are unequal.
        when = "step" if whole else "forward"
        add("weights all-gather", section.group, times * weights, times * len(buckets), when)
        if not (stage.run.optimizer.compressed_sync and section.is_matrices):
            replicas = stage.run.topology.replicas
            sent = sum(ring_bytes(4 * bucket // ranks, replicas.size) for bucket in buckets)
            add("instances all-reduce", replicas, sent, len(buckets), "backward")
    return found


def _gathers(stage: Stage) -> int:
    """How often Megatron gathers the weights in a step.

    Each of its distributed optimizers, of dense weights and of experts, gathers those of all
    (MC/optimizer/distrib_optimizer.py:3185), unless `--overlap-param-gather` does it, which needs
    overlapped gradients. Dion's chain gathers once.
    """
    has_experts = any(section.is_experts for section in stage.sections)
    overlaps = stage.run.bucket_size != 0
    return 2 if stage.run.optimizer.kind == "adamw" and has_experts and not overlaps else 1


def activations(stage: Stage, batch: Batch) -> Traffic:
    """What tensor, context, expert and pipeline parallelism send forward and backward.

    Of a layer, forward and backward, tensor parallelism with sequence parallelism gathers the input
    of two column-parallel layers, scatters the sums of two row-parallel ones, gathers their
    gradients, gathers the inputs once more, and scatters the sums of the inputs' gradients: five
    for attention and five for a feed-forward layer or shared experts. The embedding has two, or,
    with learned positions, a sum and one gather; the output layer three. Tokens of routed experts
    are gathered and scattered once each way.
    """
    run, topology, shape = stage.run, stage.run.topology, stage.run.shape
    micro_batches, layers = batch.micro_batches(topology), len(stage.layers)
    tokens = shape.sequence // topology.cp * batch.micro
    hidden = run.weight_bytes * tokens * shape.hidden  # bytes of a micro batch's hidden states
    again = batch.recompute == "full"
    routed = sum(map(shape.has_experts, stage.layers))
    has_shared = shape.experts is not None and shape.experts.shared_ffn > 0
    blocks = layers + (layers - routed) + routed * has_shared
    is_summed = stage.is_first and shape.positions > 0
    ends = (2 - is_summed) * stage.is_first + 3 * stage.is_last
    gathers = (5 + 2 * again) * blocks + ends
    sums = sum(p.numel for p in stage.parameters if p.sees_part)
    ways = micro_batches * ((not stage.is_first) + (not stage.is_last))
    keys = 2 * shape.query_groups * shape.head // topology.tp * run.weight_bytes * tokens
    hops = 3 * (topology.cp - 1) * layers * micro_batches  # keys and values twice, gradients once
    found = {
        "tensor-parallel activations": ring(
            topology.tensor,
            micro_batches * gathers * _share(hidden, topology.tp),
            micro_batches * gathers,
            "layer",
        ),
        "sums of embeddings": ring(
            topology.tensor,
            micro_batches * ring_bytes(hidden, topology.tp) * is_summed,
            micro_batches * is_summed,
            "layer",
        ),
        "tensor-parallel loss": ring(
            topology.tensor,
            micro_batches * 3 * ring_bytes(4 * tokens, topology.tp) * stage.is_last,
            micro_batches * 3 * stage.is_last,
            "layer",
        ),
        "gradients of parts": ring(topology.tensor, ring_bytes(4 * sums, topology.tp), 1, "step"),
        "pipeline sends": to_peers(topology.pipeline, ways * hidden // topology.tp, ways, "layer"),
        "context-parallel keys": ring(
            topology.context, hops * keys, hops, "layer", is_estimate=True
        ),
    }
    if shape.tied and topology.pp > 1 and (stage.is_first or stage.is_last):
        tied = sum(p.numel for p in stage.parameters if p.is_shared)
        found["tied embeddings"] = to_peers(topology.pipeline, ring_bytes(4 * tied, 2), 1, "step")
    return found | _tokens_to_experts(stage, batch)


def _tokens_to_experts(stage: Stage, batch: Batch) -> Traffic:
    """What the all-to-all dispatcher sends, where every expert gets as many tokens.

    A token goes to `top_k` experts and comes back, forward and backward; the router's probability
    goes with it, in the type of the weights. First all ranks of an expert's group tell each other
    how many tokens they have for each expert, in int64. In the tensor-parallel group tokens and
    probabilities are gathered, and their sums scattered.
    """
    run, topology, shape = stage.run, stage.run.topology, stage.run.shape
    experts, routed = shape.experts, sum(map(shape.has_experts, stage.layers))
    if experts is None or not routed:
        return {}
    times = batch.micro_batches(topology) * routed
    again = batch.recompute == "full"
    copies = shape.sequence // topology.cp * batch.micro * experts.top_k
    hidden, probabilities = run.weight_bytes * copies * shape.hidden, run.weight_bytes * copies
    both = (4 + 2 * again, hidden), (2 + again, probabilities)
    far = sum(calls * _share(size // topology.tp, topology.ep) for calls, size in both)
    near = sum(calls * _share(size, topology.tp) for calls, size in both)
    counts = 8 * experts.count * (topology.ep * topology.tp - 1)
    calls = times * sum(number for number, _ in both)
    told = times * (1 + again)
    return {
        "tokens to experts": to_peers(topology.expert, times * far, calls, "layer", True),
        "experts' tensor parallelism": ring(topology.tensor, times * near, calls, "layer", True),
        "token counts": to_peers(topology.expert, told * counts, told, "layer", True),
    }


def muon_traffic(stage: Stage) -> Traffic:
    """With `--muon-tp-mode duplicated`, gathers of all matrices on the ranks that own them."""
    optimizer, tensor = stage.run.optimizer, stage.run.topology.tensor
    if optimizer.kind != "muon" or optimizer.muon_tp_mode != "duplicated":
        return {}
    shape = stage.run.topology.data().size, tensor.size
    sent = np.zeros(shape, np.int64)
    calls = 0
    for section in stage.sections:
        of_owner = np.zeros((section.group.size, 1), np.int64)
        count = np.zeros(section.group.size, np.int64)
        for parameter, owner in section.owners():
            if parameter.weight is not None and parameter.weight.partition_dim is not None:
                of_owner[owner] += 4 * (tensor.size - 1) * parameter.numel
                count[owner] += 1
        sent += of_all(of_owner, shape)
        calls += int(count.max())
    return {"muon gathers": Sent(sent, sent * tensor.leaving, calls, "step")}


def dion_traffic(part: DionPart, stage: Stage) -> Traffic:
    """What a Dion optimizer's step sends, by the kinds of `sharding.traffic.bytes_sent`."""
    topology, layout = stage.run.topology, part.planner.layout
    shape = topology.data().size, topology.tp
    found: Traffic = {}

    def add(kind: str, group: Group, sent: Counts, in_node: Counts | None, calls: int) -> None:
        network = sent * group.leaving if in_node is None else sent - in_node
        one = Sent(of_all(sent, shape), of_all(network, shape), calls, "step")
        found[f"dion {kind}"] = found[f"dion {kind}"].plus(one) if f"dion {kind}" in found else one

    for index in range(len(part.planner.sets)):
        for kind, (sent, in_node) in set_bytes(part, index).items():
            group = topology.tensor if kind.startswith("tensor") else part.group
            group = topology.replicas if kind == "replicas" else group
            add(kind, group, sent, in_node, calls_of(part, index, kind, sent))
    dense = [i for i in range(len(layout.placements)) if i not in part.averaged]
    if stage.run.optimizer.compressed_sync and dense:
        numbers = sum(holding.elements for holding in holdings(layout, dense))
        sent = _rings(4 * np.asarray(numbers), topology.replicas.size)
        add("gradients", topology.replicas, sent, None, 1)
    if stage.run.optimizer.compressed_sync:
        sketch = ring_bytes(4 * BUCKETS, topology.replicas.size)  # of the gradients, for their norm
        add("gradient norm", topology.replicas, _everywhere(sketch, shape), None, 1)
    return found


def set_bytes(part: DionPart, index: int) -> dict[str, tuple[Counts, Counts | None]]:
    """Bytes that each rank sends (E, T) for one of the planner's sets, by kind.

    The same as `sharding.traffic.bytes_sent` of each rank's plan; of what data-parallel ranks
    exchange for sums, also the bytes that stay on a node.
    """
    planner, replicas = part.planner, part.replicas[index]
    layout, config, grid = planner.layout, planner.layout.config, planner.layout.grid
    wire, kept = (TORCH_DTYPES[t].itemsize for t in (config.comm_dtype, config.factor_dtype))
    members = planner.members(index)
    left, parts, right = count_hops(planner, members, part.group.per_node)
    shape = grid.data_parallel_size, grid.tensor_parallel_size
    rows, partial, gathered = (np.zeros(shape, np.int64) for _ in range(3))
    for holding in holdings(layout, planner.sets[index]):
        numbers = holding.rows * layout.matrices[holding.matrix].rank
        rows += numbers
        if holding.is_partial:
            partial += numbers
            gathered += holding.rows * holding.kept
    to_sum, share = in_shares(partial, shape[1], replicas)
    shared = np.zeros(shape, np.int64)
    for placement in planner.sets[index]:
        shared += shared_row_numbers(layout, placement)
    flags = 4 * len(planner.divided(index))
    most = gathered.max(axis=1, keepdims=True)
    found: dict[str, tuple[Counts, Counts | None]] = {
        "tensor rows": (_rings(wire * to_sum, shape[1]), None),
        "data rows": (wire * shared, None),
        "tensor gather": (_everywhere((shape[1] - 1) * most * kept, shape), None),
        "replicas": (
            _rings(left.charged * wire, replicas)
            + _rings(share * wire, replicas)
            + _rings((rows - partial) * wire, replicas),
            None,
        ),
    }
    for kind, hops, size in (("left", left, wire), ("parts", parts, 4), ("right", right, 8)):
        found[f"tensor {kind}"] = size * hops.tensor, None
        found[f"data {kind}"] = size * hops.data, size * hops.data_in_node
    for group, ranks in (("tensor", shape[1]), ("data", shape[0])):
        found[f"{group} flags"] = _everywhere(ring_bytes(flags, ranks), shape), None
    return found


def calls_of(part: DionPart, index: int, kind: str, sent: Counts) -> int:
    """Calls of a set's collectives of a kind, in which ranks send so much: docs/design.md."""
    if not np.any(sent):
        return 0
    if kind == "tensor parts":
        by_triangles = not part.planner.owners.keys().isdisjoint(part.planner.members(index))
        return 2 * (_phases(part, index, "tensor_parallel") + by_triangles)
    if kind == "data parts":
        return 2 * _phases(part, index, "data_parallel")
    has_shares = any(map(part.planner.layout.shares_rows, part.planner.sets[index]))
    if kind == "replicas":
        return 2 + has_shares  # P, R, and R that tensor-parallel ranks sum in shares
    if kind == "tensor rows":
        return 1 if part.replicas[index] == 1 else 2
    return 2 if kind.endswith(("left", "right")) else 1


def _phases(part: DionPart, index: int, coordinate: str) -> int:
    """Sums that a set's divided P need between ranks of different coordinates."""
    planner, oversample = part.planner, part.planner.layout.config.oversample

    def crosses(matrix: int) -> bool:
        return len({getattr(charge.rank, coordinate) for charge in planner.charges[matrix]}) > 1

    return sum(
        len(summed_rows(method, 1, oversample))
        for method, matrices in planner.divided_by_method(index).items()
        if any(map(crosses, matrices))
    )


def _share(numbers: int, ranks: int) -> int:
    """What a rank sends to reduce and scatter, or to gather, so much."""
    return numbers * (ranks - 1) // ranks


def _rings(numbers: Counts, ranks: int) -> Counts:
    """`ring_bytes` of many."""
    return 2 * numbers * (ranks - 1) // ranks


def _everywhere(value: Counts | int, shape: tuple[int, int]) -> Counts:
    return np.broadcast_to(np.asarray(value), shape)
