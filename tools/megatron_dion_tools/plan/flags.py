"""The shape of a model, and what else the planner takes, from the flags of pretrain_gpt.py."""

import argparse
from collections.abc import Sequence

from megatron_dion_tools.plan.models import Experts, GptShape

# They change the parameters of a layer, or add some.
_NOT_PLANNED = (
    "multi_latent_attention",
    "attention_output_gate",
    "mtp_num_layers",
    "experimental_attention_variant",
)


def shape_from_flags(flags: Sequence[str]) -> GptShape:
    """The model that Megatron makes of its flags; those that say nothing of its shape are passed.

    Raises:
        ValueError: a flag that it needs is missing, or the sizes do not fit.
    """
    return shape_from_arguments(_read(flags))


def run_from_flags(flags: Sequence[str]) -> dict[str, int | str]:
    """Batch sizes, where flags give them, and the type of weights.

    Raises:
        ValueError: a flag has no value, or none that it can have.
    """
    args = _read(flags)
    sizes = {name: getattr(args, name) for name in ("micro_batch_size", "global_batch_size")}
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return {**{name: size for name, size in sizes.items() if size is not None}, "dtype": dtype}


def positive(text: str) -> int:
    """A size on a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)


def _read(flags: Sequence[str]) -> argparse.Namespace:
    try:
        args, _ = _parser().parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from error
    return args


def shape_from_arguments(args: argparse.Namespace) -> GptShape:
    """The model of arguments that are named as Megatron names them, resolved or not.

    Raises:
        ValueError: as `shape_from_flags`, or the model is of a kind that is not planned.
    """
    for name in _NOT_PLANNED:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')}: such models are not planned")
    missing = [
        f"--{name.replace('_', '-')}"
        for name in ("num_layers", "hidden_size", "num_attention_heads")
        if getattr(args, name) is None
    ]
    if missing:
        raise ValueError(f"a model's flags need {', '.join(missing)}: add what is missing")
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    learned = args.position_embedding_type == "learned_absolute"
    multiple = args.make_vocab_size_divisible_by
    return GptShape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size or _default_ffn(args.hidden_size, args.swiglu),
        heads=args.num_attention_heads,
        query_groups=groups,
        kv_channels=args.kv_channels,
        gated=args.swiglu,
        vocab=args.padded_vocab_size or args.vocab_size,
        vocab_multiple=1 if args.padded_vocab_size else multiple,
        tied=not args.untie_embeddings_and_output_weights,
        biases=args.add_bias_linear,
        layer_norm=args.normalization == "LayerNorm",
        positions=args.max_position_embeddings or 0 if learned else 0,
        experts=_experts(args),
        sequence=args.seq_length or args.max_position_embeddings or 4096,
    )


def _experts(args: argparse.Namespace) -> Experts | None:
    if args.num_experts is None:
        return None
    return Experts(
        count=args.num_experts,
        top_k=args.moe_router_topk,
        ffn=args.moe_ffn_hidden_size
        or args.ffn_hidden_size
        or _default_ffn(args.hidden_size, args.swiglu),
        shared_ffn=args.moe_shared_expert_intermediate_size or 0,
        dense_layers=_dense_layers(args.moe_layer_freq),
    )


def _dense_layers(pattern: str | int | list[int]) -> int:
    """Layers without experts, of patterns such as `([0]*1+[1]*27)`, or of what they resolve to."""
    if str(pattern) == "1":
        return 0
    try:
        kinds = _kinds(pattern) if isinstance(pattern, str) else pattern
    except ValueError:
        kinds = None
    if not isinstance(kinds, list) or sorted(kinds) != kinds or not set(kinds) <= {0, 1}:
        raise ValueError(
            f"--moe-layer-freq {pattern}: only dense layers first are planned,"
            " written as ([0]*1+[1]*27)"
        )
    return kinds.count(0)


def _kinds(pattern: str) -> list[int]:
    """0 for each dense layer, 1 for each with experts."""
    kinds = []
    for part in pattern.strip().strip("()").split("+"):
        kind, _, times = part.partition("*")
        kinds += [int(kind.strip(" []"))] * int(times or 1)
    return kinds


def _default_ffn(hidden: int, gated: bool) -> int:
    """MT/arguments.py: 4 h, with a gate two thirds of it in multiples of 64."""
    return int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (
        "num-layers",
        "hidden-size",
        "ffn-hidden-size",
        "num-attention-heads",
        "kv-channels",
        "vocab-size",
        "padded-vocab-size",
        "max-position-embeddings",
        "seq-length",
        "num-experts",
        "moe-ffn-hidden-size",
        "micro-batch-size",
        "global-batch-size",
    ):
        parser.add_argument(f"--{name}", type=positive)
    for name in ("moe-shared-expert-intermediate-size", "mtp-num-layers"):  # 0 is none
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--experimental-attention-variant")
    parser.add_argument("--num-query-groups", type=positive, default=1)
    parser.add_argument("--moe-router-topk", type=positive, default=2)
    parser.add_argument("--make-vocab-size-divisible-by", type=positive, default=128)
    parser.add_argument("--moe-layer-freq", default="1")
    parser.add_argument("--normalization", default="LayerNorm")
    parser.add_argument("--position-embedding-type", default="learned_absolute")
    for name in (
        "group-query-attention",
        "swiglu",
        "untie-embeddings-and-output-weights",
        "multi-latent-attention",
        "attention-output-gate",
        "bf16",
        "fp16",
    ):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    return parser
