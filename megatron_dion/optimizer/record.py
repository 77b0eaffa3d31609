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
    "rates": ("scale_mode", "extra_scale_factor"),
}


def changes(saved: Mapping[str, object], here: Mapping[str, object]) -> str:
    """Says in a line which values of flags a run has not kept; empty if it has kept all.

    Such as `--dion-momentum 0.9 (saved), 0.95 (here); ...`. Flags that one lacks are left out.
    """
    both = ((flag, value, here[flag]) for flag, value in saved.items() if flag in here)
    return "; ".join(f"{flag} {a} (saved), {b} (here)" for flag, a, b in both if a != b)


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
        all other parameters begins anew (`scalars`), every step has another size (`rates`), or the
        run just goes on (`free`). Each has a line of `changes`.
        """
        current = here._flags()
        return {meaning: changes(v, current[meaning]) for meaning, v in self._flags().items()}

    def _flags(self) -> dict[str, dict[str, Any]]:
        """Flags and their values as the command line has them, by what a difference means."""
        values = self.to_dict() | {"right_factor": self.right_factor} | asdict(self.config)
        del values["config"]
        flags: dict[str, dict[str, Any]] = {meaning: {} for meaning in (*_MEANINGS, "free")}
        for name, value in values.items():
            meaning = next((m for m, names in _MEANINGS.items() if name in names), "free")
            flag = "--seed" if name == "seed" else f"--dion-{name.replace('_', '-')}"
            flags[meaning][flag] = ",".join(value) or "none" if isinstance(value, list) else value
        return flags
