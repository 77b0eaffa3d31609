"""The parameters of a GPT, as Megatron names, fuses and shards them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from megatron_dion.sharding import Part, Weight
from megatron_dion_tools.plan.divisors import check_divides, one_of

# Tensor-parallel ranks of more than one node would wait for the network in every layer.
_MOST_TENSOR_PARALLEL = 8


@dataclass(frozen=True)
class Parameter:
    """A parameter as it lies on a rank.

    Attributes:
        name: global name.
        shape: on a tensor-parallel rank.
        weight: how tensor parallelism shards it, where Dion updates it.
        is_expert: whether it lies on the expert-data-parallel grid.
        is_vocabulary: whether it is the embedding or the output layer.
        is_shared: whether it is tied to its copy on another pipeline stage.
        sees_part: whether each tensor-parallel rank uses it for a part of the sequence, so that its
            gradient is a sum over them.
    """

    name: str
    shape: tuple[int, ...]
    weight: Weight | None = None
    is_expert: bool = False
    is_vocabulary: bool = False
    is_shared: bool = False
    sees_part: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the layers after the first dense ones.

    Attributes:
        count: routed experts.
        top_k: of these, how many see a token.
        ffn: width of one.
        shared_ffn: width of the shared experts together; 0 for none.
        dense_layers: layers before, with a feed-forward layer of the usual kind.
    """

    count: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class GptShape:
    """Sizes of a GPT; names are those of Megatron's flags.

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
        biases: whether linear layers have biases.
        layer_norm: whether norms have a bias (LayerNorm) or not (RMSNorm).
        positions: rows of a learned embedding of positions, 0 for none.
        experts: a mixture of experts, or None.
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
    biases: bool = False
    layer_norm: bool = False
    positions: int = 0
    experts: Experts | None = None
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
        """Elements of the whole model, its vocabulary without padding."""
        everything = replace(self, vocab_multiple=1).stage(range(self.layers))
        return sum(parameter.numel for parameter in everything)

    def padded_vocab(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding (MT/vocab_utils.py:25)."""
        multiple = self.vocab_multiple * tensor_parallel_size
        return -(-(self.vocab or 0) // multiple) * multiple

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.experts is not None and layer >= self.experts.dense_layers

    def needs_ends(self, pipeline_parallel_size: int) -> bool:
        """Whether stages are even only if the embedding and the loss count as layers."""
        even = self.layers % pipeline_parallel_size == 0
        return not even and (self.layers + 2) % pipeline_parallel_size == 0

    def stage_layers(
        self, pipeline_parallel_size: int, stage: int, account_for_ends: bool = False
    ) -> range:
        """The layers of a pipeline stage.

        Args:
            pipeline_parallel_size: number of stages.
            stage: the stage.
            account_for_ends: with `--account-for-embedding-in-pipeline-split` and
                `--account-for-loss-in-pipeline-split`: first and last stage have a layer less.

        Raises:
            ValueError: there is no such stage, or the layers cannot be divided evenly.
        """
        more = 1 if account_for_ends else 0
        places = self.layers + 2 * more
        ends = " and both ends" if account_for_ends else ""
        what = f"the model's {self.layers} layers{ends}"
        check_divides("--pp", pipeline_parallel_size, places, what)
        if not 0 <= stage < pipeline_parallel_size:
            raise ValueError(f"stage {stage} is none of {pipeline_parallel_size}")
        share = places // pipeline_parallel_size
        start, stop = stage * share - more, (stage + 1) * share - more
        return range(max(start, 0), min(stop, self.layers))

    def weights(self, layers: Iterable[int], tensor_parallel_size: int = 1) -> list[Weight]:
        """Dion's weights in some layers but for experts, in the order of `stage`.

        Fused weights are split as `--dion-split` does by default: query, key, value; gate, up.

        Args:
            layers: global numbers of the layers, from 0, such as `stage_layers` gives.
            tensor_parallel_size: ranks that share each weight.

        Raises:
            ValueError: Megatron could not divide the model over so many ranks.
        """
        found = self.stage(layers, tensor_parallel_size, ends=False)
        return [p.weight for p in found if p.weight is not None and not p.is_expert]

    def stage(
        self,
        layers: Iterable[int],
        tensor_parallel_size: int = 1,
        expert_parallel: tuple[int, int] = (0, 1),
        ends: bool = True,
    ) -> list[Parameter]:
        """The parameters of a rank of a pipeline stage, in the order in which Megatron makes them.

        Args:
            layers: global numbers of its layers.
            tensor_parallel_size: ranks that share each weight.
            expert_parallel: rank and size.
            ends: with the embedding before the first layer, the last norm and the output layer
                after the last one.

        Raises:
            ValueError: Megatron could not divide the model over so many ranks.
        """
        self._check_tensor_parallel_size(tensor_parallel_size)
        layers = list(layers)
        is_first, is_last = 0 in layers, self.layers - 1 in layers
        found: list[Parameter] = []
        if ends and is_first:
            found += self._embeddings(tensor_parallel_size, is_shared=self.tied and not is_last)
        for layer in layers:
            found += self._layer(layer, tensor_parallel_size, expert_parallel)
        if ends and is_last:
            found += self._norm("decoder.final_layernorm")
            if self.vocab and not (self.tied and is_first):
                shape = self.padded_vocab(tensor_parallel_size) // tensor_parallel_size, self.hidden
                name = "output_layer.weight"
                found.append(Parameter(name, shape, is_vocabulary=True, is_shared=self.tied))
        return found

    def _check_tensor_parallel_size(self, size: int) -> None:
        for name, number in self._tensor_parallel_shares(size).items():
            if size < 1 or number % size:
                fitting = [
                    other
                    for other in range(1, _MOST_TENSOR_PARALLEL + 1)
                    if not any(n % other for n in self._tensor_parallel_shares(other).values())
                ]
                raise ValueError(
                    f"--tp {size} does not divide the model's {number} {name}:"
                    f" take {one_of(fitting)}"
                )

    def _tensor_parallel_shares(self, size: int) -> dict[str, int]:
        """What Megatron divides: a rank has whole heads, and whole query groups or part of one."""
        numbers = {"attention heads": self.heads, "columns of its feed-forward layer": self.ffn}
        if self.experts is not None:
            numbers["columns of an expert"] = self.experts.ffn
            numbers["columns of shared experts"] = self.experts.shared_ffn
        if size % self.query_groups:
            numbers["query groups"] = self.query_groups
        return numbers

    def _embeddings(self, size: int, is_shared: bool) -> Iterator[Parameter]:
        if self.vocab:
            shape = self.padded_vocab(size) // size, self.hidden
            name = "embedding.word_embeddings.weight"
            yield Parameter(name, shape, is_vocabulary=True, is_shared=is_shared)
        if self.positions:
            yield Parameter("embedding.position_embeddings.weight", (self.positions, self.hidden))

    def _norm(self, name: str) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", (self.hidden,), sees_part=True)
        if self.layer_norm:
            yield Parameter(f"{name}.bias", (self.hidden,), sees_part=True)

    def _layer(
        self, layer: int, size: int, expert_parallel: tuple[int, int]
    ) -> Iterator[Parameter]:
        """The projection out of attention comes first: Megatron's base class makes it."""
        name = f"decoder.layers.{layer}"
        attention = self.heads * self.head
        qkv = self._qkv_parts()
        qkv_rows = self.query_groups * sum(part.rows for part in qkv)
        yield from self._norm(f"{name}.input_layernorm")
        proj = f"{name}.self_attention.linear_proj"
        yield from self._linear(_row_parallel(f"{proj}.weight", self.hidden, attention, size))
        qkv_name = f"{name}.self_attention.linear_qkv.weight"
        yield from self._linear(_column_parallel(qkv_name, qkv_rows, self.hidden, size, qkv))
        yield from self._norm(f"{name}.pre_mlp_layernorm")
        if self.experts is None or not self.has_experts(layer):
            yield from self._mlp(f"{name}.mlp", self.ffn, size)
            return
        router = self.experts.count, self.hidden
        yield Parameter(f"{name}.mlp.router.weight", router, sees_part=True)
        rank, ranks = expert_parallel
        here = self.experts.count // ranks
        for expert in range(rank * here, (rank + 1) * here):
            of_expert = f"{name}.mlp.experts.local_experts.{expert}"
            yield from self._mlp(of_expert, self.experts.ffn, size, is_expert=True)
        if self.experts.shared_ffn:
            yield from self._mlp(f"{name}.mlp.shared_experts", self.experts.shared_ffn, size)

    def _mlp(self, name: str, ffn: int, size: int, is_expert: bool = False) -> Iterator[Parameter]:
        rows = (2 if self.gated else 1) * ffn
        parts = self._fc1_parts(ffn, size)
        fc1 = _column_parallel(f"{name}.linear_fc1.weight", rows, self.hidden, size, parts)
        yield from self._linear(fc1, is_expert)
        fc2 = _row_parallel(f"{name}.linear_fc2.weight", self.hidden, ffn, size)
        yield from self._linear(fc2, is_expert)

    def _linear(self, weight: Weight, is_expert: bool = False) -> Iterator[Parameter]:
        yield Parameter(weight.name, (weight.rows, weight.columns), weight, is_expert)
        if self.biases:
            name = weight.name.replace(".weight", ".bias")
            # Those of row-parallel layers are added after the sum is scattered.
            sees_part = weight.partition_dim == 1
            yield Parameter(name, (weight.rows,), is_expert=is_expert, sees_part=sees_part)

    def _qkv_parts(self) -> tuple[Part, ...]:
        """A query group's rows."""
        queries = self.heads // self.query_groups * self.head
        return Part("query", queries), Part("key", self.head), Part("value", self.head)

    def _fc1_parts(self, ffn: int, tensor_parallel_size: int) -> tuple[Part, ...]:
        """A rank's rows: gate and up projection are interleaved rank by rank."""
        rows = ffn // tensor_parallel_size
        return (Part("gate", rows), Part("up", rows)) if self.gated else ()


def _column_parallel(
    name: str, rows: int, columns: int, size: int, parts: tuple[Part, ...]
) -> Weight:
    return Weight(name, rows // size, columns, 0 if size > 1 else None, size, parts)


def _row_parallel(name: str, rows: int, columns: int, size: int) -> Weight:
    return Weight(name, rows, columns // size, 1 if size > 1 else None, size)


def _gpt3(layers: int, hidden: int, heads: int, tied: bool = True) -> GptShape:
    """A shape of GPT-3 (arXiv 2005.14165, table 2.1), with GPT-2's vocabulary."""
    return GptShape(
        layers=layers,
        hidden=hidden,
        ffn=4 * hidden,
        heads=heads,
        query_groups=heads,
        gated=False,
        vocab=50257,
        tied=tied,
        biases=True,
        layer_norm=True,
        positions=2048,
        sequence=2048,
    )


def _llama3(layers: int, hidden: int, ffn: int, heads: int) -> GptShape:
    """A shape of Llama 3 (arXiv 2407.21783, table 3)."""
    return GptShape(layers, hidden, ffn, heads, query_groups=8, vocab=128256, sequence=8192)


PRESETS: dict[str, GptShape] = {
    "160M": _gpt3(12, 768, 12, tied=False),  # GPT-3's 125M with an output layer of its own
    "350M": _gpt3(24, 1024, 16),
    "760M": _gpt3(24, 1536, 16),
    "1.3B": _gpt3(24, 2048, 16),  # the paper's 24 heads of 128 do not make up its width 2048
    "2.7B": _gpt3(32, 2560, 32),
    "8B": _llama3(32, 4096, 14336, 32),
    "70B": _llama3(80, 8192, 28672, 64),
    "405B": _llama3(126, 16384, 53248, 128),
    # DeepSeekMoE (arXiv 2401.06066, section 5.1.2 and the published configuration)
    "16B-MoE": GptShape(
        layers=28,
        hidden=2048,
        ffn=10944,
        heads=16,
        query_groups=16,
        vocab=102400,
        experts=Experts(count=64, top_k=6, ffn=1408, shared_ffn=2816, dense_layers=1),
    ),
}
