"""What a pipeline stage of the model computes, keeps and sends, apart from the optimizer's part.

Products are counted as 2 m n k operations. Sent bytes are those of a ring: of N bytes in a group of
k, a reduce-scatter or all-gather sends N (k - 1) / k and an all-reduce twice that. Left out is what
is about one per cent or less: padding of buffers, sums of the loss and of the gradients of norms,
and counts of tokens.
"""

from collections.abc import Iterator

from megatron_dion.optimizer.norm_estimate import DRAWS, WIDTH
from megatron_dion_tools.plan.stage import Stage
from megatron_dion_tools.plan.updates import Collective, Update


def model_work(stage: Stage) -> tuple[float, float]:
    """Operations of a micro batch on a rank of a stage, forward and backward.

    Products with weights, 2 per element and token, and causal attention, half of all pairs.
    Backward twice as much; attention once more with `selective` recomputation, all layers with
    `full`.
    """
    run, topology, shape = stage.run, stage.run.topology, stage.run.shape
    tokens = shape.sequence // topology.cp * run.micro_batch
    products = 2.0 * tokens * stage.matrices
    width = shape.heads * shape.head // topology.tp
    attention = 2.0 * shape.sequence * tokens * width * len(stage.layers)
    layers = products + attention
    logits = 2.0 * tokens * shape.padded_vocab(topology.tp) // topology.tp * shape.hidden
    forward = layers + logits * stage.is_last
    again = {"none": 0.0, "selective": attention, "full": layers}[run.recompute]
    return forward, 2 * forward + again


def memory(stage: Stage, update: Update) -> dict[str, float]:
    """Bytes by kind on a rank of a stage.

    * `weights` and `gradients` (float32): of all parameters of the stage.
    * `masters`: float32 copies of a rank's own matrices; none where weights are fp32 already.
    * `momenta`: of matrices, with AdamW their second moments too.
    * `right factors`, `exchange`, `temporaries`: Dion's Q, the buffers of its collectives, and what
      a step of it takes besides.
    * `scalars`: masters and moments of all that is no matrix.
    * `activations ~`: an estimate (`activation_bytes`).
    """
    master = 0 if stage.run.weight_bytes == 4 else 4
    kinds = ("momenta", "right factors", "exchange", "temporaries")
    return {
        "weights": stage.run.weight_bytes * stage.numel,
        "gradients": 4 * stage.numel,
        "masters": master * update.elements,
        **{kind: update.memory.get(kind, 0) for kind in kinds},
        "scalars": (master + 8) * stage.others / stage.group.size,
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
    scores = 5 * shape.heads * shape.sequence if run.recompute == "none" else 0
    layer = 18 * shape.hidden + (6 if shape.gated else 4) * shape.ffn + scores
    numbers = in_flight * layer * len(stage.layers)
    if run.recompute == "full":
        numbers = in_flight * 2 * shape.hidden * len(stage.layers) + layer
    logits = 8 * shape.padded_vocab(topology.tp) * stage.is_last
    return tokens * (numbers * run.weight_bytes / 2 + logits)


def gradients_and_weights(stage: Stage) -> Iterator[Collective]:
    """Gradients are reduced, updated weights gathered."""
    run, group, replicas = stage.run, stage.group, stage.run.topology.group("replicas")
    calls = -(-stage.numel // (stage.bucket_size or stage.numel))
    kind, factor, when = "reduce-scatter", 1, "forward"
    if run.optimizer.kind == "muon":  # every rank gets whole gradients
        kind, factor, when = "all-reduce", 2, "step"
    gradients = factor * _share(4 * stage.numel, group.size)
    yield Collective(f"gradients {kind}", group, gradients, calls, "backward")
    weights = _share(run.weight_bytes * stage.numel, group.size)
    yield Collective("weights all-gather", group, weights, calls, when)
    averaged = stage.others if run.optimizer.compressed_sync else stage.numel
    sums = 2 * _share(4 * averaged / group.size, replicas.size)
    yield Collective("instances all-reduce", replicas, sums, calls, "backward")
    if run.optimizer.compressed_sync:  # the norm of gradients that nobody has
        yield Collective("gradient norm", replicas, 2 * _share(4 * DRAWS * WIDTH, replicas.size), 1)


def activations(stage: Stage) -> Iterator[Collective]:
    """What tensor, context and pipeline parallelism send forward and backward.

    Of a layer, forward and backward, tensor parallelism with sequence parallelism gathers the input
    of two column-parallel layers, scatters the sums of two row-parallel ones, gathers their
    gradients, gathers the inputs once more, and scatters the sums of the inputs' gradients: five
    for attention and five for the feed-forward layer. The embedding has two, the output layer
    three.
    """
    run, topology, shape = stage.run, stage.run.topology, stage.run.shape
    group, micro_batches = topology.group, run.micro_batches
    tokens = shape.sequence // topology.cp * run.micro_batch
    hidden = run.weight_bytes * tokens * shape.hidden  # bytes of a micro batch's hidden states
    blocks = 2 * len(stage.layers)
    ends = 2 * stage.is_first + 3 * stage.is_last
    calls = micro_batches * ((7 if run.recompute == "full" else 5) * blocks + ends)
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


def _share(numbers: float, ranks: int) -> float:
    """What a rank sends to reduce and scatter, or to gather, so much; an all-reduce is both."""
    return numbers * (ranks - 1) / ranks
