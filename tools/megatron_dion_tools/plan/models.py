"""The weights of a GPT, as Megatron names, fuses and shards them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_dion.sharding.matrices import Part, Weight


@dataclass(frozen=True)
class GptShape:
    """Sizes of a GPT; biases and learned positions are left out.

    Attributes:
        layers: number of transformer layers.
        hidden: width of the residual stream.
        ffn: width of the feed-forward layer, of gate and up projection each.
        heads: attention heads, that is, queries.
        query_groups: heads of key and value each.
        kv_channels: width of a head; None for hidden / heads.
        gated: whether the feed-forward layer has a gate (SwiGLU).
        vocab: tokens; None leaves the embedding and the output layer out. Dion updates neither.
        vocab_multiple: their rows are padded to a multiple of this and of the tensor-parallel size.
        tied: whether the output layer is the embedding.
        sequence: tokens of a sequence.

    Raises:
        ValueError: the heads do not fit the width or the query groups.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    query_groups: int
    kv_channels: int | None = None
    gated: bool = True
    vocab: int | None = None
    vocab_multiple: int = 128
    tied: bool = False
    sequence: int = 4096

    def __post_init__(self) -> None:
        if self.kv_channels is None:
            width = f"--hidden-size {self.hidden}"
            check_divides("--num-attention-heads", self.heads, self.hidden, width)
        heads = f"--num-attention-heads {self.heads}"
        check_divides("--num-query-groups", self.query_groups, self.heads, heads)

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads if self.kv_channels is None else self.kv_channels

    @property
    def parameters(self) -> int:
        """Elements of the whole model, its vocabulary padded for one rank."""
        layers = range(self.layers)
        matrices = sum(w.rows * w.columns for w in self.weights(layers))
        return matrices + self.other_elements(layers)

    def padded_vocab(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding (MT/vocab_utils.py:25)."""
        multiple = self.vocab_multiple * tensor_parallel_size
        return -(-(self.vocab or 0) // multiple) * multiple

    def stage_layers(self, pipeline_parallel_size: int, stage: int) -> range:
        """The layers of a pipeline stage.

        Where stages are even only if the embedding and the loss count as layers, first and last
        stage have a layer less (`--account-for-embedding-in-pipeline-split` and
        `--account-for-loss-in-pipeline-split`).

        Raises:
            ValueError: the layers cannot be divided evenly.
        """
        size, layers = pipeline_parallel_size, self.layers
        ends = int(layers % size > 0 and (layers + 2) % size == 0)
        check_divides("--pp", size, layers + 2 * ends, f"the model's {layers} layers")
        per_stage = (layers + 2 * ends) // size
        start = stage * per_stage - ends
        return range(max(start, 0), min(start + per_stage, layers))

    def weights(self, layers: Iterable[int], tensor_parallel_size: int = 1) -> list[Weight]:
        """Dion's weights in some layers, in the order in which Megatron makes them.

        Fused weights are split as `--dion-split` does by default: query, key, value; gate, up.

        Raises:
            ValueError: Megatron could not divide the model over so many ranks.
        """
        size = tensor_parallel_size
        check_divides("--tp", size, self.heads, f"the model's {self.heads} attention heads")
        check_divides("--tp", size, self.ffn, f"the {self.ffn} columns of its feed-forward layer")
        if size % self.query_groups:  # a rank has whole query groups, or part of one
            groups = f"the model's {self.query_groups} query groups"
            check_divides("--tp", size, self.query_groups, groups)
        return [weight for layer in layers for weight in self._layer(layer, size)]

    def other_elements(self, layers: Iterable[int], tensor_parallel_size: int = 1) -> int:
        """Elements of the embeddings, the output layer and norms on a rank with some layers."""
        layers = list(layers)
        vocabulary = self.padded_vocab(tensor_parallel_size) // tensor_parallel_size
        is_first, is_last = 0 in layers, self.layers - 1 in layers
        rows = 2 * len(layers) + is_last
        rows += vocabulary * is_first
        rows += vocabulary * (is_last and not (self.tied and is_first))
        return rows * self.hidden

    def _layer(self, layer: int, size: int) -> Iterator[Weight]:
        """The projection out of attention comes first: Megatron's base class makes it."""
        name, attention = f"decoder.layers.{layer}", self.heads * self.head
        queries = self.heads // self.query_groups * self.head
        qkv = Part("query", queries), Part("key", self.head), Part("value", self.head)
        rows = self.query_groups * sum(part.rows for part in qkv)
        yield self._row_parallel(f"{name}.self_attention.linear_proj", attention, size)
        yield self._column_parallel(f"{name}.self_attention.linear_qkv", rows, size, qkv)
        # A rank's rows of gate and up projection alternate.
        rows = self.ffn // size
        parts = (Part("gate", rows), Part("up", rows)) if self.gated else ()
        rows = 2 * self.ffn if self.gated else self.ffn
        yield self._column_parallel(f"{name}.mlp.linear_fc1", rows, size, parts)
        yield self._row_parallel(f"{name}.mlp.linear_fc2", self.ffn, size)

    def _column_parallel(self, name: str, rows: int, size: int, parts: tuple[Part, ...]) -> Weight:
        dim = 0 if size > 1 else None
        return Weight(f"{name}.weight", rows // size, self.hidden, dim, size, parts)

    def _row_parallel(self, name: str, columns: int, size: int) -> Weight:
        dim = 1 if size > 1 else None
        return Weight(f"{name}.weight", self.hidden, columns // size, dim, size)


def divisors(number: int) -> list[int]:
    """All divisors of a number, from 1 on."""
    return [n for n in range(1, number + 1) if number % n == 0]


def check_divides(flag: str, size: int, number: int, what: str) -> None:
    """Refuse the size that a flag gives, if it does not divide a number that `what` describes."""
    if number % size:
        below = max(n for n in divisors(number) if n < size)
        above = [f" or {n}" for n in divisors(number) if n > size][:1]
        raise ValueError(f"{flag} {size} does not divide {what}: take {below}{''.join(above)}")
