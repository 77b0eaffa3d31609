"""The shape of a model, and what else the planner takes, from flags of pretrain_gpt.py."""

from collections.abc import Sequence
from pathlib import Path

from megatron_dion_tools.local.flags import read_flags
from megatron_dion_tools.plan.models import GptShape

_PRESETS = {path.stem: path for path in Path(__file__).with_name("presets").glob("*.args")}
# They change the parameters of a layer, or add some.
_NOT_PLANNED = {
    *("multi-latent-attention", "attention-output-gate", "experimental-attention-variant"),
    *("mtp-num-layers", "num-experts"),
}


def read_model(name: str) -> tuple[GptShape, dict[str, int]]:
    """The shape of a preset, or of a file of flags of pretrain_gpt.py.

    And `weight-bytes`, `micro-batch-size` and `global-batch-size`; 0 where the flags do not say it.

    Raises:
        ValueError: there is no such preset or file, or a mistake is in it.
    """
    path = _PRESETS.get(name, Path(name))
    if not path.is_file():
        presets = ", ".join(sorted(_PRESETS))
        raise ValueError(f"MODEL {name}: no file of flags, and no preset ({presets})")
    try:
        words = read_flags(path)
        flags = _values(words)
        settings = {n: _size(flags, n) for n in ("micro-batch-size", "global-batch-size")}
        settings["weight-bytes"] = 2 if flags.keys() & {"bf16", "fp16"} else 4
        return shape_from_flags(words), settings
    except ValueError as error:
        raise ValueError(f"MODEL {name}: {error}") from error


def shape_from_flags(words: Sequence[str]) -> GptShape:
    """The model that Megatron makes of its flags; those that say nothing of its shape are passed.

    Raises:
        ValueError: a flag that it needs is missing, the sizes do not fit, or the model is of a kind
            that is not planned.
    """
    flags = _values(words)
    if refused := flags.keys() & _NOT_PLANNED:
        raise ValueError(f"--{min(refused)} is not planned: leave it out")
    needed = ("num-layers", "hidden-size", "num-attention-heads")
    layers, hidden, heads = sizes = [_size(flags, name) for name in needed]
    if not all(sizes):
        missing = [f"--{n}" for n, size in zip(needed, sizes, strict=True) if not size]
        raise ValueError(f"a model's flags need {', '.join(missing)}: add what is missing")
    gated = "swiglu" in flags
    # MT/arguments.py: 4 h, with a gate two thirds of it in multiples of 64.
    usual_ffn = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden
    ffn = _size(flags, "ffn-hidden-size", usual_ffn)
    padded = _size(flags, "padded-vocab-size")
    is_grouped = "group-query-attention" in flags
    return GptShape(
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        query_groups=_size(flags, "num-query-groups", 1) if is_grouped else heads,
        kv_channels=_size(flags, "kv-channels") or None,
        gated=gated,
        vocab=padded or _size(flags, "vocab-size") or None,
        vocab_multiple=1 if padded else _size(flags, "make-vocab-size-divisible-by", 128),
        tied="untie-embeddings-and-output-weights" not in flags,
        sequence=_size(flags, "seq-length") or _size(flags, "max-position-embeddings", 4096),
    )


def _values(words: Sequence[str]) -> dict[str, str]:
    """Flags without their dashes, and their values; that of a switch is empty."""
    flags = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            flags[name] = value or ("" if after.startswith("--") else after)
    return flags


def _size(flags: dict[str, str], name: str, default: int = 0) -> int:
    value = flags.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"--{name} {value} is no whole number: give one")
    return int(value)


PRESETS = {name: read_model(name)[0] for name in sorted(_PRESETS)}
"""The shapes of the presets, by name."""
