"""What a checkpoint with Dion's state says about the run that wrote it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_dion.algorithm import DionConfig
from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.optimizer.rules import RoutingRules

# Raised whenever older code could not read what newer code writes.
FORMAT = 2

# Keys of optimizer state are `optimizer.state.<kind>.<tensor of the model>`, as Megatron's, or,
# of a logical matrix, `optimizer.state.dion.<kind>.<matrix>`.
PREFIX = "optimizer.state"
DION_PREFIX = f"{PREFIX}.dion"
WEIGHT, MOMENTUM, RIGHT_FACTOR = KINDS = ("weight", "momentum", "right_factor")

_FACTORS = ("rank_fraction", "rank_multiple_of", "right_factor", "split")
_ROUTES = ("include", "exclude")
_SCALARS = ("scalar_optimizer",)


@dataclass(frozen=True)
class Differences:
    """The hyperparameters that a checkpoint and a run do not share, by what that means.

    Each is a line like `--dion-rank-fraction 0.25 (saved), 0.5 (here)`.

    Attributes:
        factors: with them right factors have to begin anew.
        routes: with them Dion updates other parameters.
        scalars: with them the state of all other parameters has to begin anew.
        free: those that any run may make on its way.
    """

    factors: tuple[str, ...]
    routes: tuple[str, ...]
    scalars: tuple[str, ...]
    free: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """Hyperparameters of Dion, the routing rules, and the optimizer of all other parameters.

    Attributes:
        config: hyperparameters.
        rules: of the routing.
        scalar_optimizer: `adam` or `lion`.
        right_factor: how R became Q. Every run of this version divides columns by their norms;
            checkpoints of earlier ones may say `orth`.
    """

    config: DionConfig
    rules: RoutingRules
    scalar_optimizer: str
    right_factor: str = "colnorm"

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
        """The inverse of `to_dict`; hyperparameters that this version does not have are left out.

        Raises:
            CheckpointError: a newer version wrote the values.
        """
        if values["format"] > FORMAT:
            raise CheckpointError(
                f"Dion's state in it has format {values['format']}, and this version of"
                f" megatron-dion knows formats up to {FORMAT}: install a newer one"
            )
        saved, known = values["config"], {field.name for field in fields(DionConfig)}
        return cls(
            DionConfig(**{name: value for name, value in saved.items() if name in known}),
            RoutingRules(
                frozenset(values["split"]), tuple(values["include"]), tuple(values["exclude"])
            ),
            values["scalar_optimizer"],
            saved.get("right_factor", cls.right_factor),
        )

    @classmethod
    def of_checkpoint(cls, common: Mapping[str, Any]) -> "Record | None":
        """The record in a checkpoint's common state; None if its optimizer is not Dion.

        Raises:
            CheckpointError: a newer version wrote it.
        """
        state = common.get("optimizer", {})
        return cls.from_dict(state["dion"]) if "dion" in state else None

    def differences(self, here: "Record") -> Differences:
        """What a run has otherwise than this checkpoint."""
        saved, current = _flat(self), _flat(here)
        lines = {
            name: f"{_flag(name)} {value} (saved), {current[name]} (here)"
            for name, value in saved.items()
            if value != current[name]
        }
        serious = (_FACTORS, _ROUTES, _SCALARS)
        free = [name for name in lines if not any(name in names for names in serious)]
        groups = (*serious, free)
        return Differences(*(tuple(lines[n] for n in names if n in lines) for names in groups))


def _flat(record: Record) -> dict[str, Any]:
    """By name, as the command line has them."""
    values = record.to_dict()
    values |= {"right_factor": record.right_factor, **values.pop("config")}
    lists = {name: ",".join(v) or "none" for name, v in values.items() if isinstance(v, list)}
    return values | lists


def _flag(name: str) -> str:
    return "--seed" if name == "seed" else f"--dion-{name.replace('_', '-')}"
