"""What a checkpoint with Dion's state says about the run that wrote it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.optimizer.rules import RoutingRules

# Raised whenever older code could not read what newer code writes.
FORMAT = 2

# Keys of optimizer state are `optimizer.state.<kind>.<tensor of the model>`, as Megatron's, or,
# of a logical matrix, `optimizer.state.dion.<kind>.<matrix>`.
PREFIX = "optimizer.state"
DION_PREFIX = f"{PREFIX}.dion"
WEIGHT, MOMENTUM, RIGHT_FACTOR = KINDS = ("weight", "momentum", "right_factor")

# What a hyperparameter that differs means; all others may change on the way of a run.
_MEANINGS = {
    "factors": ("rank_fraction", "rank_multiple_of", "right_factor", "split"),
    "routes": ("include", "exclude"),
    "scalars": ("scalar_optimizer",),
}


@dataclass(frozen=True)
class Record:
    """Hyperparameters of Dion, the routing rules, and the optimizer of all other parameters."""

    config: DionConfig
    rules: RoutingRules
    scalar_optimizer: str  # `adam` or `lion`
    right_factor: str = "colnorm"  # how R became Q; in earlier versions also `orth`

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
    def of_state(cls, state: Mapping[str, Any]) -> "Record | None":
        """The record in the saved state of an optimizer; None if it is not Dion's.

        Hyperparameters that this version does not have are left out.

        Raises:
            CheckpointError: a newer version wrote it.
        """
        if (values := state.get("dion")) is None:
            return None
        if values["format"] > FORMAT:
            raise CheckpointError(
                f"Dion's state in it has format {values['format']}, and this version of"
                f" megatron-dion knows formats up to {FORMAT}: install a newer one"
            )
        known = {field.name for field in fields(DionConfig)}
        saved = {"residual": "none"} | values["config"]  # what checkpoints without the setting had
        config = DionConfig(**{name: value for name, value in saved.items() if name in known})
        split, *patterns = (values[name] for name in ("split", "include", "exclude"))
        rules = RoutingRules(frozenset(split), *map(tuple, patterns))
        right_factor = saved.get("right_factor", cls.right_factor)
        return cls(config, rules, values["scalar_optimizer"], right_factor)

    def differences(self, here: "Record") -> dict[str, str]:
        """Flags in which this checkpoint and a run differ, by what the difference means.

        Right factors begin anew (`factors`), Dion updates other parameters (`routes`), the state of
        all other parameters begins anew (`scalars`), or the run just goes on (`free`). Each has a
        line such as `--dion-momentum 0.9 (saved), 0.95 (here); ...`, perhaps an empty one.
        """
        lines: dict[str, list[str]] = {meaning: [] for meaning in (*_MEANINGS, "free")}
        current = here._flags()
        for name, value in self._flags().items():
            if value != current[name]:
                meaning = next((m for m, names in _MEANINGS.items() if name in names), "free")
                flag = "--seed" if name == "seed" else f"--dion-{name.replace('_', '-')}"
                lines[meaning].append(f"{flag} {value} (saved), {current[name]} (here)")
        return {meaning: "; ".join(differing) for meaning, differing in lines.items()}

    def _flags(self) -> dict[str, Any]:
        """Values by name, as the command line has them."""
        values = self.to_dict() | {"right_factor": self.right_factor} | asdict(self.config)
        del values["config"]
        lists = {name: ",".join(v) or "none" for name, v in values.items() if isinstance(v, list)}
        return values | lists
