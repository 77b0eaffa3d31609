"""Golden curves: what a case's runs gave when somebody looked at them and found them good."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dion.megatron.run_directory import replace_file
from megatron_dion_tools.convergence.curves import QUANTITIES, Curve, Curves
from megatron_dion_tools.convergence.environment import Environment
from megatron_dion_tools.convergence.errors import ConvergenceError


@dataclass(frozen=True)
class Golden:
    """The golden curves of a case.

    Attributes:
        environment: in which they were made.
        commands: the flags of each run, without data, by name of run.
        curves: by name of run and seed.
    """

    environment: Environment
    commands: Mapping[str, str]
    curves: Mapping[str, Mapping[int, Curves]]

    def seeds(self, run: str) -> list[Curves]:
        """The curves of a run, one for each seed.

        Raises:
            ConvergenceError: the run has none.
        """
        if run not in self.curves:
            has = ", ".join(self.curves)
            raise ConvergenceError(f"no golden curves of run {run!r} (there are: {has}): update")
        return list(self.curves[run].values())


def read_golden(path: Path) -> Golden:
    """Read golden curves.

    Raises:
        ConvergenceError: there are none, or the file is broken.
    """
    if not path.exists():
        raise ConvergenceError(f"{path}: no golden curves yet; make them with `update`")
    try:
        header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        curves: dict[str, dict[int, dict[str, Curve]]] = {}
        for line in lines:
            quantities = curves.setdefault(line["run"], {}).setdefault(line["seed"], {})
            points = zip(line["iterations"], line["values"], strict=True)
            quantities[line["quantity"]] = dict(points)
        return Golden(
            environment=header["environment"],
            commands=header["commands"],
            curves={
                run: {seed: Curves(_name(run, seed), table) for seed, table in seeds.items()}
                for run, seeds in curves.items()
            },
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConvergenceError(f"{path}: no golden curves in it ({error!r})") from error


def write_golden(path: Path, golden: Golden) -> None:
    """Write golden curves in full precision: what is read back is the same, bit for bit.

    Raises:
        ConvergenceError: a number is not finite. Nothing is written.
    """
    require_finite(golden)
    header = {"environment": golden.environment, "commands": golden.commands}
    lines = [header, *_lines(golden)]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def require_finite(golden: Golden) -> None:
    """Refuse curves of which nobody can say that they are good.

    Raises:
        ConvergenceError: a number is not finite; says which.
    """
    for run, seeds in golden.curves.items():
        for seed, curves in seeds.items():
            for quantity, curve in curves.quantities.items():
                wrong = next((i for i, value in curve.items() if not math.isfinite(value)), None)
                if wrong is not None:
                    raise ConvergenceError(
                        f"{run}, seed {seed}: {quantity} is {curve[wrong]} at iteration {wrong}: "
                        "such a run cannot become golden, nothing was written"
                    )


def difference(old: Golden | None, new: Golden) -> list[str]:
    """What new curves change, a line for each run and quantity."""
    lines = []
    for run, seeds in new.curves.items():
        before = {} if old is None else old.curves.get(run, {})
        if not before:
            lines.append(f"{run}: new, {len(seeds)} seeds")
            continue
        if set(seeds) != set(before):
            lines.append(f"{run}: seeds {_list(seeds)} instead of {_list(before)}")
        for quantity in QUANTITIES:
            lines += _change(run, quantity, before, seeds)
    gone = set() if old is None else set(old.curves) - set(new.curves)
    return lines + [f"{run}: removed" for run in sorted(gone)]


def _change(
    run: str, quantity: str, before: Mapping[int, Curves], after: Mapping[int, Curves]
) -> list[str]:
    pairs = {
        seed: (curves.quantities.get(quantity, {}), before[seed].quantities.get(quantity, {}))
        for seed, curves in after.items()
        if seed in before
    }
    lines = [
        f"{run}: {quantity}: {len(curve)} iterations instead of {len(earlier)} (seed {seed})"
        for seed, (curve, earlier) in pairs.items()
        if curve.keys() != earlier.keys()
    ][:1]
    changes = [
        (abs(curve[i] - earlier[i]), i, seed)
        for seed, (curve, earlier) in pairs.items()
        for i in curve
        if i in earlier
    ]
    if not changes:
        return lines
    size, iteration, seed = max(changes)
    if size == 0:
        return lines or [f"{run}: {quantity}: unchanged"]
    first = min(i for change, i, _ in changes if change)
    return [
        *lines,
        f"{run}: {quantity}: differs from iteration {first}, most at {iteration} (seed {seed}): "
        f"by {size:.3g}",
    ]


def _list(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def _lines(golden: Golden) -> Iterator[dict[str, Any]]:
    """A line for each curve, so that a diff shows which ones changed."""
    for run, seeds in golden.curves.items():
        for seed, curves in seeds.items():
            for quantity, curve in curves.quantities.items():
                if quantity in QUANTITIES:
                    yield {
                        "run": run,
                        "seed": seed,
                        "quantity": quantity,
                        "iterations": list(curve),
                        "values": list(curve.values()),
                    }


def _name(run: str, seed: int) -> str:
    return f"golden {run}, seed {seed}"
