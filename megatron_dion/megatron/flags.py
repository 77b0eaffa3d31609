"""The flags that this project adds to Megatron's command line, made from dataclasses.

Each field is a flag: its type, its default and the docstring below it are the flag's. The flags of
`DionConfig` and `DionOptions` begin with `--dion-`.
"""

import argparse
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NoReturn

from megatron_dion.algorithm.config import DionConfig, check_fields, checked
from megatron_dion.megatron.errors import ConfigurationError, refuse
from megatron_dion.optimizer.rules import SPLITS, RoutingRules

ParserHook = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

# What Megatron's defaults have to become without Transformer Engine, which brings these fusions.
PLAIN_TORCH_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    **dict.fromkeys(("gradient_accumulation_fusion", "masked_softmax_fusion"), False),
    "apply_rope_fusion": False,
}

# The same on CPU.
CPU_DEFAULTS: dict[str, Any] = {
    **PLAIN_TORCH_DEFAULTS,
    **dict.fromkeys(("bias_gelu_fusion", "bias_swiglu_fusion", "bias_dropout_fusion"), False),
    "distributed_backend": "gloo",  # nccl moves CUDA memory only
    "use_cpu_initialization": True,  # weights then do not depend on the tensor-parallel size
    "async_strategy": "mcore",  # the default needs nvidia-resiliency-ext, which needs CUDA
    "num_workers": 0,  # worker processes compete with the training for the same cores
}

# Flags that earlier versions had, and what to do instead.
REMOVED = {
    "--dion-orthonormalizer": "Dion has one orthonormalizer: leave the flag out",
    "--dion-oversample": "Dion has one orthonormalizer, without a sketch: leave the flag out",
    "--dion-right-factor": "the columns of right factors are normalized (colnorm): leave the flag "
    "out, and add --dion-reinit-factors once where a checkpoint has orth",
    "--dion-exchange-buffer-mib": "give a number of sets, --dion-exchange-sets; megatron-dion plan"
    " says what memory they need",
    "--dion-print-plan": "leave the flag out; megatron-dion plan says what ranks need",
    "--fp8-emulation": "FP8 needs a GPU with Transformer Engine: leave the flag out",
}


def _split(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    unknown = sorted(set(names) - set(SPLITS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{','.join(unknown)!r} is not one of {', '.join(SPLITS)}, none"
        )
    return names


@dataclass(frozen=True)
class DionOptions:
    """What a run chooses about Dion beside the hyperparameters in `config`."""

    config: DionConfig = field(default_factory=DionConfig)

    split: list[str] = field(
        default_factory=lambda: ["qkv", "gate"],
        metadata={
            "argparse_meta": {"type": _split, "nargs": None, "metavar": f"{','.join(SPLITS)}|none"}
        },
    )
    """Update the matrices of these fused weights one by one: query, key and value; gate and up
    projection; each attention head."""

    include: list[str] = field(default_factory=list)
    """Name patterns, as of file names, of 2-D parameters that Dion updates in any case."""

    exclude: list[str] = field(default_factory=list)
    """Name patterns of parameters that the scalar optimizer updates in any case."""

    scalar_optimizer: Literal["adam", "lion"] = "adam"
    """Optimizer of the parameters that are not matrices of linear layers."""

    scalar_lr_mult: float = checked(1.0, lambda x: 0 < x < math.inf, "positive and finite")
    """Learning rate of the scalar optimizer, as a multiple of --lr."""

    compressed_sync: bool = False
    """Average low-rank factors in place of gradients over the instances of
    --num-distributed-optimizer-instances, where the factors are smaller."""

    recenter_interval: int | None = checked(None, lambda n: n is None or n >= 1, "at least 1")
    """With --dion-compressed-sync, replace momenta by their mean over the instances every N
    iterations."""

    log_interval: int | None = checked(None, lambda n: n is None or n >= 1, "at least 1")
    """Log the diagnostics of the step of every N-th iteration, matrix by matrix."""

    reinit_factors: bool = False
    """Load the momenta of a checkpoint, also with another rank or split, and begin the right
    factors anew."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def rules(self) -> RoutingRules:
        """Which parameters go to Dion, and as which matrices."""
        return RoutingRules(frozenset(self.split), tuple(self.include), tuple(self.exclude))


@dataclass(frozen=True)
class RunOptions:
    """What a run with any optimizer chooses."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What to train on; auto is cuda where there is a CUDA device, else cpu."""

    run_dir: str | None = None
    """Folder for config.json, routing.tsv, metrics.jsonl and starts.jsonl."""

    switch_optimizer: bool = False
    """Load a checkpoint of --optimizer adam with dion, or the reverse: master weights are kept, the
    optimizer's state begins anew."""

    no_checkpoint_hashes: bool = False
    """Neither write nor compare the SHA-256 of checkpoint files."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the project's flags. Megatron must have been prepared for the device."""
    # Only now: importing megatron needs a platform.
    from megatron.training.argument_utils import ArgumentGroupFactory

    for kind, prefix in ((DionConfig, "dion-"), (DionOptions, "dion-"), (RunOptions, "")):
        factory = ArgumentGroupFactory(kind)
        group = parser.add_argument_group(kind.__name__, str(kind.__doc__).partition("\n")[0])
        for attribute in fields(kind):
            if attribute.name in ("seed", "config"):
                continue  # --seed is Megatron's; `config` is a dataclass of its own
            keywords = factory._build_argparse_kwargs_from_field(attribute)
            [flag] = keywords.pop("arg_names")
            keywords["dest"] = prefix.replace("-", "_") + attribute.name
            group.add_argument(flag.replace("--", f"--{prefix}", 1), **keywords)


def extend_parser(parser: argparse.ArgumentParser, device: str) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser, and change defaults that have no meaning on the CPU."""
    # Megatron's usage is hundreds of lines, and every process would print them.
    setattr(parser, "error", _refuse)  # noqa: B010  (mypy refuses an assignment to a method)
    for action in parser._actions:
        if action.dest == "optimizer":
            action.choices = [*(action.choices or ()), "dion"]
        # Some of Megatron's help texts have a bare percent sign, on which --help breaks off.
        action.help = action.help and re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    add_flags(parser)
    if device == "cpu":
        parser.set_defaults(**CPU_DEFAULTS)
    elif importlib.util.find_spec("transformer_engine") is None:
        parser.set_defaults(**PLAIN_TORCH_DEFAULTS)
    return parser


def _refuse(message: str) -> NoReturn:
    refuse_removed_flags(message.split())
    raise ConfigurationError(f"{message} (see --help)")


def refuse_removed_flags(words: Sequence[str]) -> None:
    """A script may ignore flags that its parser does not know: it would ignore these as well."""
    given = {word.partition("=")[0] for word in words}
    for flag, advice in REMOVED.items():
        refuse(f"{flag} was removed: {advice}", when=flag in given)


def dion_options(args: argparse.Namespace) -> DionOptions:
    """Read what the parsed command line says of Dion; refuses values that are out of range."""
    try:
        config = DionConfig(seed=args.seed, **_values(DionConfig, args))
        return DionOptions(config, **_values(DionOptions, args))
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ConfigurationError(f"--dion-{name.replace('_', '-')} {rest}") from error


def _values(kind: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    names = [attribute.name for attribute in fields(kind)]
    return {name: getattr(args, f"dion_{name}") for name in names if hasattr(args, f"dion_{name}")}


def given_dion_flags(args: argparse.Namespace) -> Iterator[str]:
    """The flags of Dion that are not at their defaults, with their values."""
    for kind in (DionConfig, DionOptions):
        for name, value in _values(kind, args).items():
            if value != getattr(kind(), name):
                yield as_flag(f"dion_{name}", value)


def as_flag(name: str, value: object) -> str:
    """An argument as it stands on the command line."""
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value}"
