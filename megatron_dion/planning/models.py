"""The weights that Dion updates in a dense GPT, as Megatron names, fuses and shards them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_dion.sharding import Part, Weight


@dataclass(frozen=True)
class GptShape:
    """Sizes of a dense GPT without biases; names are those of Megatron's flags.

    Attributes:
        layers: number of transformer layers.
        hidden: width of the residual stream.
        ffn: width of the feed-forward layer, of gate and up projection each.
        heads: attention heads, that is, queries.
        query_groups: heads of key and value each.
        kv_channels: width of a head; None for hidden / heads.
        gated: whether the feed-forward layer has a gate (SwiGLU).
        vocab: rows of the embedding and of the output layer, padded, untied; None leaves both out
            of `parameters`. Dion updates neither.

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

    def __post_init__(self) -> None:
        if self.kv_channels is None:
            _check_multiple("hidden", self.hidden, "heads", self.heads)
        _check_multiple("heads", self.heads, "query_groups", self.query_groups)

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads if self.kv_channels is None else self.kv_channels

    @property
    def parameters(self) -> int:
        """Elements of the whole model: Dion's weights, norms (no biases), vocabulary."""
        matrices = sum(w.rows * w.columns for w in self._layer_weights(0, 1)) * self.layers
        norms = (2 * self.layers + 1) * self.hidden
        return matrices + norms + 2 * (self.vocab or 0) * self.hidden

    def stage_layers(self, pipeline_parallel_size: int, stage: int) -> range:
        """The layers of a pipeline stage, where Megatron divides them evenly.

        Raises:
            ValueError: there is no such stage, or the layers cannot be divided evenly.
        """
        _check_multiple("layers", self.layers, "pipeline_parallel_size", pipeline_parallel_size)
        if not 0 <= stage < pipeline_parallel_size:
            raise ValueError(f"stage {stage} is none of {pipeline_parallel_size}")
        share = self.layers // pipeline_parallel_size
        return range(stage * share, (stage + 1) * share)

    def weights(self, layers: Iterable[int], tensor_parallel_size: int = 1) -> list[Weight]:
        """Dion's weights in some layers, in the order in which Megatron registers parameters.

        Fused weights are split as `--dion-split` does by default: query, key, value; gate, up.

        Args:
            layers: global numbers of the layers, from 0, such as `stage_layers` gives.
            tensor_parallel_size: ranks that share each weight.

        Raises:
            ValueError: Megatron could not divide the model over so many ranks.
        """
        self._check_tensor_parallel_size(tensor_parallel_size)
        return [w for layer in layers for w in self._layer_weights(layer, tensor_parallel_size)]

    def _check_tensor_parallel_size(self, size: int) -> None:
        """Megatron's conditions: a rank has whole heads, and whole query groups or part of one."""
        name = "tensor_parallel_size"
        _check_multiple("heads", self.heads, name, size)
        _check_multiple("ffn", self.ffn, name, size)
        if size % self.query_groups:
            _check_multiple("query_groups", self.query_groups, name, size)

    def _layer_weights(self, layer: int, tensor_parallel_size: int) -> Iterator[Weight]:
        """The projection out of attention comes first: Megatron's base class makes it."""
        name = f"decoder.layers.{layer}"
        size = tensor_parallel_size
        attention = self.heads * self.head
        qkv, fc1 = self._qkv_parts(), self._fc1_parts(size)
        qkv_rows = self.query_groups * sum(part.rows for part in qkv)
        fc1_rows = (2 if self.gated else 1) * self.ffn
        proj = f"{name}.self_attention.linear_proj.weight"
        yield _row_parallel(proj, self.hidden, attention, size)
        qkv_name = f"{name}.self_attention.linear_qkv.weight"
        yield _column_parallel(qkv_name, qkv_rows, self.hidden, size, qkv)
        yield _column_parallel(f"{name}.mlp.linear_fc1.weight", fc1_rows, self.hidden, size, fc1)
        yield _row_parallel(f"{name}.mlp.linear_fc2.weight", self.hidden, self.ffn, size)

    def _qkv_parts(self) -> tuple[Part, ...]:
        """A query group's rows."""
        queries = self.heads // self.query_groups * self.head
        return Part("query", queries), Part("key", self.head), Part("value", self.head)

    def _fc1_parts(self, tensor_parallel_size: int) -> tuple[Part, ...]:
        """A rank's rows: gate and up projection are interleaved rank by rank."""
        rows = self.ffn // tensor_parallel_size
        return (Part("gate", rows), Part("up", rows)) if self.gated else ()


def _column_parallel(
    name: str, rows: int, columns: int, size: int, parts: tuple[Part, ...]
) -> Weight:
    return Weight(name, rows // size, columns, 0 if size > 1 else None, size, parts)


def _row_parallel(name: str, rows: int, columns: int, size: int) -> Weight:
    return Weight(name, rows, columns // size, 1 if size > 1 else None, size)


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if divisor < 1 or value % divisor:
        raise ValueError(f"{name} {value} is no multiple of {divisor_name} {divisor}")


# Llama 3 (arXiv 2407.21783, table 3); its vocabulary is 128256.
PRESETS: dict[str, GptShape] = {
    "8B": GptShape(32, 4096, 14336, 32, 8, vocab=128256),
    "70B": GptShape(80, 8192, 28672, 64, 8, vocab=128256),
    "405B": GptShape(126, 16384, 53248, 128, 8, vocab=128256),
}
