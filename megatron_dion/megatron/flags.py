"""The flags that this project adds to Megatron's command line, made from dataclasses.

Each field is a flag, with the field's type, default, docstring and range. The flags of
`DionConfig`, `RoutingRules` and `DionOptions` begin with `--dion-`.
"""

import argparse
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, NoReturn, get_origin

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.megatron.errors import ConfigurationError, refuse
from megatron_dion.optimizer.options import DionOptions
from megatron_dion.optimizer.rules import RoutingRules

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


@dataclass(frozen=True)
class RunOptions:
    """What a run with any optimizer chooses."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What to train on; auto is cuda where there is a CUDA device, else cpu."""

    run_dir: str | None = None
    """Folder for config.json, routing.tsv, metrics.jsonl and starts.jsonl."""

    switch_optimizer: bool = False
    """Load a checkpoint of --optimizer adam or muon with dion, or of dion with adam: master weights
    are kept, momenta of muon too; the other state begins anew."""

    no_checkpoint_hashes: bool = False
    """Neither write nor compare the SHA-256 of checkpoint files."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the project's flags. Megatron must have been prepared for the device."""
    # Only now: importing megatron needs a platform.
    from megatron.training.argument_utils import ArgumentGroupFactory

    class FlagFactory(ArgumentGroupFactory):
        """Knows tuples and sets of strings, too: they are lists on the command line."""

        def _extract_type(self, config_type: Any) -> Any:
            is_names = get_origin(config_type) in (tuple, frozenset)
            return super()._extract_type(list[str] if is_names else config_type)

    for kind in (DionConfig, RoutingRules, DionOptions, RunOptions):
        prefix = "" if kind is RunOptions else "dion-"
        factory = FlagFactory(kind)
        group = parser.add_argument_group(kind.__name__, str(kind.__doc__).partition("\n")[0])
        for attribute in fields(kind):
            if attribute.name == "seed" or is_dataclass(attribute.type):
                continue  # --seed is Megatron's; a dataclass has a group of its own
            keywords = factory._build_argparse_kwargs_from_field(attribute)
            [flag] = keywords.pop("arg_names")
            keywords["dest"] = prefix.replace("-", "_") + attribute.name
            if isinstance(keywords["default"], tuple | frozenset):
                keywords["default"] = sorted(keywords["default"])
            if "check" in attribute.metadata:
                keywords["help"] += f" Must be {attribute.metadata['check'][1]}."
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
    """What the parsed command line says of Dion; refuses values that are out of range."""
    try:
        return _read(DionOptions, args)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ConfigurationError(f"--dion-{name.replace('_', '-')} {rest}") from error


def _read[T](kind: type[T], args: argparse.Namespace) -> T:
    """An object of a dataclass, and of those of its fields, from the parsed command line."""
    values: dict[str, Any] = {}
    for attribute in fields(kind):  # type: ignore[arg-type]
        name = attribute.name
        if isinstance(attribute.type, type) and is_dataclass(attribute.type):
            values[name] = _read(attribute.type, args)
        else:
            value = getattr(args, name if name == "seed" else f"dion_{name}")
            as_names: Any = get_origin(attribute.type)
            values[name] = as_names(value) if isinstance(value, list) else value
    return kind(**values)


def given_dion_flags(options: DionOptions) -> list[str]:
    """The flags of Dion that are not at their defaults, with their values."""
    defaults = _by_name(DionOptions())
    given = {name: value for name, value in _by_name(options).items() if value != defaults[name]}
    return [as_flag(f"dion_{name}", value) for name, value in given.items() if name != "seed"]


def _by_name(options: DionOptions) -> dict[str, Any]:
    values = asdict(options)
    return values.pop("config") | values.pop("rules") | values


def as_flag(name: str, value: object) -> str:
    """An argument as it stands on the command line."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, tuple | frozenset):
        value = sorted(value)
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return flag if value is True else f"{flag} {value}"
