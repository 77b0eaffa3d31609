"""What a checkpoint with Dion's state says about the run that wrote it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_dion.algorithm import DionConfig
from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.optimizer.rules import RoutingRules

# Raised whenever older code could not read what newer code writes.
FORMAT = 2

# What the size or the meaning of right factors depends on.
_OF_FACTORS = ("rank_fraction", "rank_multiple_of", "right_factor", "split")
# Which optimizer a parameter's state is of.
_OF_ROUTES = ("include", "exclude")
_OF_SCALARS = ("scalar_optimizer",)


@dataclass(frozen=True)
class Difference:
    """A hyperparameter that a checkpoint and a run do not share."""

    name: str
    saved: Any
    here: Any

    def __str__(self) -> str:
        flag = f"--dion-{self.name.replace('_', '-')}" if self.name != "seed" else "--seed"
        return f"{flag} {_as_value(self.saved)} (saved), {_as_value(self.here)} (here)"


@dataclass(frozen=True)
class Record:
    """Hyperparameters of Dion, the routing rules, and the optimizer of all other parameters."""

    config: DionConfig
    rules: RoutingRules
    scalar_optimizer: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the part of a checkpoint that all ranks share."""
        return {
            "format": FORMAT,
            "config": asdict(self.config),
            "split": sorted(self.rules.split),
            "include": list(self.rules.include),
            "exclude": list(self.rules.exclude),
            "scalar_optimizer": self.scalar_optimizer,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: a newer version wrote the values.
        """
        if values["format"] > FORMAT:
            raise CheckpointError(
                f"Dion's state in it has format {values['format']}, and this version of"
                f" megatron-dion knows formats up to {FORMAT}: install a newer one"
            )
        rules = RoutingRules(
            frozenset(values["split"]), tuple(values["include"]), tuple(values["exclude"])
        )
        return cls(DionConfig(**values["config"]), rules, values["scalar_optimizer"])

    def differences(self, here: "Record") -> "Differences":
        """What a run has otherwise than this checkpoint."""
        saved, current = _flat(self), _flat(here)
        found = [
            Difference(name, value, current[name])
            for name, value in saved.items()
            if current[name] != value
        ]
        groups = (_OF_FACTORS, _OF_ROUTES, _OF_SCALARS)
        named = {name for group in groups for name in group}
        factors, routes, scalars = (tuple(d for d in found if d.name in group) for group in groups)
        return Differences(factors, routes, scalars, tuple(d for d in found if d.name not in named))


@dataclass(frozen=True)
class Differences:
    """The differences of a checkpoint and a run by what they mean.

    Attributes:
        factors: with them right factors have to begin anew.
        routes: with them other parameters are Dion's.
        scalars: with them the state of all other parameters has to begin anew.
        free: those that any run may make on its way.
    """

    factors: tuple[Difference, ...]
    routes: tuple[Difference, ...]
    scalars: tuple[Difference, ...]
    free: tuple[Difference, ...]


def _flat(record: Record) -> dict[str, Any]:
    values = record.to_dict()
    return {**values.pop("config"), **values}


def _as_value(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
