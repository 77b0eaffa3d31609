"""Rates of machines, from data sheets or files, and what share of them is assumed to be reached."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """One device, and its links; `machines.toml` says what each figure is."""

    source: str
    half: float
    tf32: float
    single: float
    memory: float
    bandwidth: float
    node_link: float
    network: float
    ranks_per_node: int = 8
    latency: float = 30e-6
    launch: float = 5e-6
    product_share: float = 0.6
    factorization_share: float = 0.1
    bandwidth_share: float = 0.8
    link_share: float = 0.7


_TABLES: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("machines.toml").read_text(encoding="utf-8")
)
MACHINES = {name: Hardware(**table) for name, table in _TABLES.items()}


def hardware(name: str) -> Hardware:
    """A machine of `machines.toml`, or a TOML file with the lines of one.

    Raises:
        ValueError: there is no such machine or file, or the file lacks or has other lines.
    """
    if name in MACHINES:
        return MACHINES[name]
    if not Path(name).is_file():
        raise ValueError(f"--hardware {name}: no file, and none of {', '.join(MACHINES)}")
    try:
        machine = Hardware(**tomllib.loads(Path(name).read_text(encoding="utf-8")))
        if not all(value > 0 for key, value in vars(machine).items() if key != "source"):
            raise ValueError("a rate is not positive")
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).removeprefix("Hardware.__init__() ").split())
        raise ValueError(f"--hardware {name}: {reason}: write it as plan/machines.toml") from error
    return machine
