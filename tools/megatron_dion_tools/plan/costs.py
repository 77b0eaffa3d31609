"""What a pipeline stage of the model computes, keeps and sends, apart from the optimizer's part.

Products are counted as 2 m n k operations. Sent bytes are those of a ring: of N bytes in a group of
k, a reduce-scatter or all-gather sends N (k - 1) / k and an all-reduce twice that. Left out is what
is about one per cent or less: routers, padding of buffers, sums of the loss and of the gradients of
norms, and counts of tokens.
"""

from collections.abc import Iterator

from megatron_dion.optimizer.norm_estimate import DRAWS, WIDTH
from megatron_dion_tools.plan.stage import Stage
from megatron_dion_tools.plan.updates import Collective, Update


def model_work(stage: Stage) -> tuple[float, float]:
    """Operations of a micro batch on a rank of a stage.

    Products with weights, 2 per element and token, and causal attention, half of all pairs.
    Backward twice as much; attention once more with `selective` recomputation, all layers with
    `full`. Experts get as many tokens each.

    Returns:
        Those of the forward and of the backward pass, with what is computed again.
    """
    run, topology, shape = stage.run, stage.run.topology, stage.run.shape
    tokens = shape.sequence // topology.cp * run.micro_batch
    products = 2.0 * tokens * stage.sections[0].matrices
    if shape.experts is not None:
        routed = sum(section.matrices for section in stage.sections[1:])
        products += 2.0 * tokens * routed * shape.experts.top_k * topology.ep / shape.experts.count
    width = shape.heads * shape.head // topology.tp
    attention = 2.0 * shape.sequence * tokens * width * len(stage.layers)
    layers = products + attention
    logits = 2.0 * tokens * shape.padded_vocab(topology.tp) // topology.tp * shape.hidden
    forward = layers + logits * stage.is_last
    again = {"none": 0.0, "selective": attention, "full": layers}[run.recompute]
    return forward, 2 * forward + again


def memory(stage: Stage, updates: list[Update]) -> dict[str, float]:
    """Bytes by kind on a rank of a stage.

    * `weights` and `gradients` (float32): of all parameters of the stage.
    * `masters`: float32 copies of a rank's own matrices; none where weights are fp32 already.
    * `momenta`: of matrices, with AdamW their second moments too.
    * `right factors`, `exchange`: Dion's Q, and the buffers of its collectives.
    * `scalars`: masters and moments of all that is no matrix.
    * `activations ~`: an estimate (`activation_bytes`).

    Args:
        stage: the stage.
        updates: of its sections.
    """
    master = 0 if stage.run.weight_bytes == 4 else 4
    numel = sum(section.numel for section in stage.sections)
    others = sum(section.others / section.group.size for section in stage.sections)
    kinds = ("momenta", "right factors", "exchange")
    return {
        "weights": stage.run.weight_bytes * numel,
        "gradients": 4 * numel,
        "masters": master * sum(update.elements for update in updates),
        **{kind: sum(update.memory.get(kind, 0) for update in updates) for kind in kinds},
        "scalars": (master + 8) * others,
        "activations ~": activation_bytes(stage),
    }


def activation_bytes(stage: Stage) -> float:
    """An estimate of a rank's activations at their peak, in bytes.

    After Korthikanti et al. (arXiv 2205.05198, table 2): of a layer and micro batch with bf16 and
    sequence parallelism (18 h + 4 ffn, with a gate 6 ffn) bytes per token over tensor-parallel
    ranks, attention scores not kept; with `full` recomputation 2 h, and one layer's at a time.
    Without any, 5 bytes per score besides. As many micro batches as 1F1B has in flight; float32
    logits and their gradient in the last stage.
    """
    run, topology, shape = stage.run, stage.run.topology, stage.run.shape
    tokens = shape.sequence // topology.cp * run.micro_batch / topology.tp
    in_flight = min(run.micro_batches, topology.pp - stage.index)
    per_layer = []
    for layer in stage.layers:
        ffn = shape.ffn
        if shape.experts is not None and shape.has_experts(layer):
            ffn = shape.experts.top_k * shape.experts.ffn + shape.experts.shared_ffn
        scores = 5 * shape.heads * shape.sequence if run.recompute == "none" else 0
        per_layer.append(18 * shape.hidden + (6 if shape.gated else 4) * ffn + scores)
    numbers = in_flight * sum(per_layer)
    if run.recompute == "full":
        numbers = in_flight * 2 * shape.hidden * len(per_layer) + max(per_layer, default=0)
    logits = 8 * shape.padded_vocab(topology.tp) * stage.is_last
    return tokens * (numbers * run.weight_bytes / 2 + logits)


def gradients_and_weights(stage: Stage) -> Iterator[Collective]:
    """Gradients are reduced, updated weights gathered."""
    run, optimizer, replicas = stage.run, stage.run.optimizer, stage.run.topology.group("replicas")
    for section in stage.sections:
        group = section.group
        calls = -(-section.numel // (stage.bucket_size or section.numel))
        of = " of experts" if section.is_experts else ""
        kind, factor, when = "reduce-scatter", 1, "forward"
        if optimizer.kind == "muon":  # every rank gets whole gradients
            kind, factor, when = "all-reduce", 2, "step"
        gradients = factor * _share(4 * section.numel, group.size)
        yield Collective(f"gradients {kind}{of}", group, gradients, calls, "backward")
        weights = _share(run.weight_bytes * section.numel, group.size)
        yield Collective(f"weights all-gather{of}", group, weights, calls, when)
        averaged = section.others if optimizer.compressed_sync else section.numel
        sums = 2 * _share(4 * averaged / group.size, replicas.size)
        yield Collective(f"instances all-reduce{of}", replicas, sums, calls, "backward")
    if optimizer.compressed_sync:  # the norm of gradients that nobody has
        yield Collective("gradient norm", replicas, 2 * _share(4 * DRAWS * WIDTH, replicas.size), 1)


def activations(stage: Stage) -> Iterator[Collective]:
    """What tensor, context, pipeline and expert parallelism send forward and backward.

    Of a layer, forward and backward, tensor parallelism with sequence parallelism gathers the input
    of two column-parallel layers, scatters the sums of two row-parallel ones, gathers their
    gradients, gathers the inputs once more, and scatters the sums of the inputs' gradients: five
    for attention and five for a feed-forward layer or shared experts. The embedding has two, the
    output layer three.

    Of routed experts, a token goes to `top_k` and comes back, forward and backward, and the
    router's probability with it; in the tensor-parallel group both are gathered and their sums
    scattered. Every expert gets as many tokens.
    """
    run, topology, shape = stage.run, stage.run.topology, stage.run.shape
    group = topology.group
    micro_batches, again = run.micro_batches, run.recompute == "full"
    tokens = shape.sequence // topology.cp * run.micro_batch
    hidden = run.weight_bytes * tokens * shape.hidden  # bytes of a micro batch's hidden states
    routed = sum(map(shape.has_experts, stage.layers))
    has_shared = shape.experts is not None and shape.experts.shared_ffn > 0
    blocks = 2 * len(stage.layers) - routed + routed * has_shared
    ends = 2 * stage.is_first + 3 * stage.is_last
    calls = micro_batches * ((7 if again else 5) * blocks + ends)
    sent = calls * _share(hidden, topology.tp)
    yield Collective("activations", group("tensor"), sent, calls, "layer")
    calls = micro_batches * ((not stage.is_first) + (not stage.is_last))
    sent = calls * hidden / topology.tp
    yield Collective("pipeline sends", group("pipeline"), sent, calls, "layer", to_peers=True)
    # Keys and values go around twice, their gradients once.
    keys = 2 * shape.query_groups * shape.head / topology.tp * run.weight_bytes * tokens
    calls = 3 * (topology.cp - 1) * len(stage.layers) * micro_batches
    yield Collective("keys and values ~", group("context"), calls * keys, calls, "layer")
    if shape.tied and topology.pp > 1 and (stage.is_first or stage.is_last):
        numel = shape.padded_vocab(topology.tp) // topology.tp * shape.hidden
        yield Collective("tied embeddings", group("pipeline"), 4 * numel, 1, to_peers=True)
    if shape.experts is not None and routed:
        ways, probabilities = (6, 3) if again else (4, 2)
        calls = micro_batches * routed * (ways + probabilities)
        copies = micro_batches * routed * tokens * shape.experts.top_k * run.weight_bytes
        sent = copies * (ways * shape.hidden + probabilities)
        far, near = _share(sent / topology.tp, topology.ep), _share(sent, topology.tp)
        yield Collective("tokens ~", group("expert"), far, calls, "layer", to_peers=True)
        yield Collective("tokens ~", group("tensor"), near, calls, "layer")


def _share(numbers: float, ranks: int) -> float:
    """What a rank sends to reduce and scatter, or to gather, so much; an all-reduce is both."""
    return numbers * (ranks - 1) / ranks
