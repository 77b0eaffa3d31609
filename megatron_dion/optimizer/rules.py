"""The rules that choose a parameter's optimizer: names and shapes in, a reason out. No Megatron."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch.nn import Parameter

from megatron_dion.algorithm.config import check_fields, checked

SPLITS = ("qkv", "gate", "heads")


@dataclass(frozen=True)
class RoutingRules:
    """What a user chooses about the routing: which weights are split, included and excluded.

    Raises:
        ValueError: a value is outside of its range.
    """

    split: frozenset[str] = checked(
        frozenset({"qkv", "gate"}),
        lambda names: names <= set(SPLITS),
        f"of {', '.join(SPLITS)}",
        type=lambda text: [] if text == "none" else text.split(","),
        nargs=None,
        metavar=f"{','.join(SPLITS)}|none",
    )
    """Update the matrices of these fused weights one by one: query, key and value, or what
    multi-latent attention has in their place (qkv); gate and up projection (gate); each attention
    head, in place of qkv (heads)."""

    include: tuple[str, ...] = ()
    """Name patterns, as of file names, of 2-D parameters that Dion updates in any case."""

    exclude: tuple[str, ...] = ()
    """Name patterns of parameters that the scalar optimizer updates in any case."""

    def __post_init__(self) -> None:
        check_fields(self)

    def decide(self, name: str, parameter: Parameter) -> tuple[bool, str]:
        """Whether Dion updates a parameter, and why or why not.

        Raises:
            ValueError: the rules include a parameter that Dion cannot update.
        """
        if parameter.dim() != 2:
            return False, f"{parameter.dim()}-D"
        if pattern := _match(self.exclude, name):
            return False, f"excluded by {pattern}"
        if pattern := _match(self.include, name):
            if getattr(parameter, "shared_embedding", False):
                raise ValueError(
                    f"{name} is included by {pattern}, but two pipeline stages hold a copy of it:"
                    " Dion cannot update it"
                )
            return True, f"included by {pattern}"
        if getattr(parameter, "is_embedding_or_output_parameter", False):
            return False, "embedding or output layer"
        if "embedding" in name:
            return False, "embedding"
        if name.endswith("router.weight"):
            return False, "router of experts"
        if name.endswith("shared_experts.gate_weight"):
            return False, "gate of shared experts"
        return True, "linear layer"

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raises ValueError for a pattern that no parameter's name matches."""
        names = list(names)
        for pattern in (*self.include, *self.exclude):
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"no parameter's name matches {pattern!r}; they are called like {names[0]}"
                )


def _match(patterns: Iterable[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatch(name, pattern)), None)


def in_order_of_layers(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def without_numbers(name: str) -> str:
    """The same for all layers and experts: `decoder.layers.*.mlp.linear_fc2.weight`."""
    return re.sub(r"\.\d+(?=[.\]])", ".*", name)
