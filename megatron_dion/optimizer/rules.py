"""The rules by which parameters are routed: names and shapes in, a reason out. No Megatron."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch.nn import Parameter

SPLITS = ("qkv", "gate", "heads")


@dataclass(frozen=True)
class RoutingRules:
    """What one can choose about the routing.

    Attributes:
        split: which fused weights are split into their matrices: `qkv` (query, key, value, and what
            multi-latent attention has in their place), `gate` (gate and up projection), `heads`
            (each attention head of its own, in place of `qkv`).
        include: patterns (as of file names) of 2-D parameters that Dion takes in any case.
        exclude: patterns of parameters that the scalar optimizer takes in any case.

    Raises:
        ValueError: an unknown split.
    """

    split: frozenset[str] = frozenset({"qkv", "gate"})
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(self.split - set(SPLITS))
        if unknown:
            raise ValueError(f"split must be of {SPLITS}, not {unknown}")

    def reason_against(self, name: str, parameter: Parameter) -> str | None:
        """Why a parameter is none of Dion's, or None if it is.

        Raises:
            ValueError: Dion is to take a parameter that it cannot.
        """
        if parameter.dim() != 2:
            return f"{parameter.dim()}-D"
        if pattern := _match(self.exclude, name):
            return f"excluded by {pattern}"
        if pattern := _match(self.include, name):
            if getattr(parameter, "shared_embedding", False):
                raise ValueError(
                    f"{name} is included by {pattern}, but two pipeline stages hold a copy of it:"
                    " Dion cannot update it"
                )
            return None
        if getattr(parameter, "is_embedding_or_output_parameter", False):
            return "embedding or output layer"
        if "embedding" in name:
            return "embedding"
        if name.endswith("router.weight"):
            return "router of experts"
        if name.endswith("shared_experts.gate_weight"):
            return "gate of shared experts"
        return None

    def reason_for(self, name: str) -> str:
        """Why a parameter that nothing speaks against is Dion's."""
        pattern = _match(self.include, name)
        return f"included by {pattern}" if pattern else "linear layer"

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
