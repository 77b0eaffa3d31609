"""A case: runs, and what must hold between them. Read from a yaml file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_dion_tools.convergence.checks import SHARE
from megatron_dion_tools.convergence.curves import GRAD_NORM, LOSS
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.local.flags import read_flags, split_flags


@dataclass(frozen=True)
class RunSpec:
    """One run of a case.

    Attributes:
        name: in the case.
        flags: of pretrain_gpt.py, after those that all runs of the case share.
        processes: number of ranks.
        continues: name of the run from whose checkpoint this one starts, if it does.
        at: iteration of that checkpoint.
        patch: `file:function` that every rank calls before training.
    """

    name: str
    flags: tuple[str, ...]
    processes: int = 1
    continues: str | None = None
    at: int | None = None
    patch: str | None = None


@dataclass(frozen=True)
class Exact:
    """`run` has the numbers of `reference`, bit for bit."""

    run: str
    reference: str
    quantities: tuple[str, ...]


@dataclass(frozen=True)
class Band:
    """`run` stays within `share` of the seed noise around `reference`, which is golden."""

    run: str
    reference: str
    share: float
    quantities: tuple[str, ...]


@dataclass(frozen=True)
class Below:
    """`run` lies below `reference` at iteration `at`, over all seeds."""

    run: str
    reference: str
    at: int
    quantities: tuple[str, ...]


Check = Exact | Band | Below
KINDS = {"exact": Exact, "band": Band, "below": Below}
# The settings that only one kind has: the type of each, and its default if it has one.
_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "exact": {},
    "band": {"share": ((int, float), SHARE)},
    "below": {"at": (int,)},
}


@dataclass(frozen=True)
class Control:
    """A run with a known mistake, which checks must notice.

    Attributes:
        run: a run of the case with the mistake, whose name it has.
        checks: against the run without it; each of them must fail.
    """

    run: RunSpec
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Case:
    """What is trained, and what is compared how.

    Attributes:
        name: of its file.
        description: what the case is for.
        flags: of all runs.
        vocab_size: of the prepared corpus to train on; None where the flags name the data.
        seeds: the first is that of all checks but `below`; all of them measure the noise.
        short: whether it is run on every change.
        runs: by name.
        golden: names of the runs whose curves are kept.
        checks: between runs.
        controls: runs with a known mistake.
    """

    name: str
    description: str
    flags: tuple[str, ...]
    vocab_size: int | None
    seeds: tuple[int, ...]
    short: bool
    runs: Mapping[str, RunSpec]
    golden: tuple[str, ...]
    checks: tuple[Check, ...]
    controls: tuple[Control, ...]

    def spec(self, name: str) -> RunSpec:
        """The run of a name, with or without a mistake."""
        mistakes = {control.run.name: control.run for control in self.controls}
        return (mistakes | dict(self.runs))[name]

    def seeds_of(self, run: str) -> tuple[int, ...]:
        """The seeds with which a check needs a run."""
        in_pairs = {
            name for c in self.checks if isinstance(c, Below) for name in (c.run, c.reference)
        }
        return self.seeds if run in in_pairs else self.seeds[:1]


def read_case(path: Path) -> Case:
    """Read a case's file.

    Raises:
        ConvergenceError: it is not what a case's file has to be; names file, key and value.
    """
    try:
        return _parse(path, yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConvergenceError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConvergenceError(f"{path}: not yaml: {' '.join(str(error).split())}") from error
    except _Wrong as error:
        raise ConvergenceError(f"{path}: {error}") from error


class _Wrong(Exception):
    """What is wrong with a part of a file."""


def _parse(path: Path, content: Any) -> Case:
    top = _Table("the case", content)
    arguments = _arguments(path.parent, top.take("arguments", str))
    runs = {
        name: _run(name, _Table(f"run {name}", spec))
        for name, spec in top.take("runs", dict).items()
    }
    case = Case(
        name=path.stem,
        description=top.take("description", str),
        flags=(*arguments, *_flags(top)),
        vocab_size=top.take("vocab_size", int, None),
        seeds=top.take_list("seeds", int),
        short=top.take("short", bool, False),
        runs=runs,
        golden=top.take_list("golden", str),
        checks=tuple(map(_check, top.take("checks", list, []))),
        controls=tuple(
            _control(name, _Table(f"control {name}", spec), runs, path.parent)
            for name, spec in top.take("controls", dict, {}).items()
        ),
    )
    top.finish()
    _require_known_runs(case)
    return case


def _arguments(folder: Path, name: str) -> tuple[str, ...]:
    try:
        return read_flags(folder / name)
    except (OSError, ValueError) as error:
        raise _Wrong(f"the case: arguments cannot be {name!r} ({error})") from error


def _flags(spec: "_Table") -> tuple[str, ...]:
    flags = spec.take("flags", str, "")
    try:
        return split_flags(flags)
    except ValueError as error:  # a quotation that does not end
        raise _Wrong(f"{spec.name}: flags cannot be {flags!r} ({error})") from error


def _run(name: str, spec: "_Table") -> RunSpec:
    _require_folder_name(spec, name)
    run = RunSpec(
        name=name,
        flags=_flags(spec),
        processes=spec.take("processes", int, 1),
        continues=spec.take("continues", str, None),
        at=spec.take("at", int, None),
    )
    spec.finish()
    if (run.continues is None) != (run.at is None):
        raise _Wrong(f"run {name}: 'continues' and 'at' need each other")
    return run


def _check(entry: Any) -> Check:
    if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in KINDS:
        raise _Wrong(f"checks: {entry!r} is not one of {', '.join(KINDS)} with its settings")
    [(kind, settings)] = entry.items()
    table = _Table(f"check {kind}", settings)
    options = {name: table.take(name, *how) for name, how in _OPTIONS[kind].items()}
    check: Check = KINDS[kind](
        run=table.take("run", str),
        reference=table.take("reference", str),
        quantities=table.take_list("quantities", str, [LOSS, GRAD_NORM]),
        **options,
    )
    table.finish()
    return check


def _control(name: str, spec: "_Table", runs: Mapping[str, RunSpec], folder: Path) -> Control:
    _require_folder_name(spec, name)
    if name in runs:
        raise _Wrong(f"control {name}: a run has this name, too")
    instead_of = spec.take("instead_of", str)
    if instead_of not in runs:
        raise _Wrong(f"control {name}: there is no run {instead_of!r}")
    right = runs[instead_of]
    run = RunSpec(
        name=name,
        flags=(*right.flags, *_flags(spec)),
        processes=right.processes,
        continues=right.continues,
        at=right.at,
        patch=_patch(spec, folder),
    )
    fields = {"run": name, "reference": instead_of}
    checks = [_check({kind: fields}) for kind in spec.take_list("noticed_by", str)]
    spec.finish()
    return Control(run, tuple(checks))


def _patch(spec: "_Table", folder: Path) -> str | None:
    patch = spec.take("patch", str, None)
    if patch is None:
        return None
    file, _, function = patch.partition(":")
    if not function or not (folder / file).is_file():
        raise _Wrong(f"{spec.name}: patch cannot be {patch!r}: FILE:FUNCTION, beside the case")
    return f"{folder / file}:{function}"


def _require_folder_name(spec: "_Table", name: Any) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
        raise _Wrong(f"{spec.name}: {name!r} cannot be the name of its folder")


def _require_known_runs(case: Case) -> None:
    named = dict.fromkeys(case.golden, "golden")
    for check in case.checks:
        named |= {check.run: "a check", check.reference: "a check"}
    named |= {run.continues: f"run {run.name}" for run in case.runs.values() if run.continues}
    for name, by in named.items():
        if name not in case.runs:
            raise _Wrong(f"{by} names a run {name!r} (there are {', '.join(case.runs)})")
    for run in case.runs.values():
        if run.continues and case.runs[run.continues].continues:
            raise _Wrong(f"run {run.name}: {run.continues} continues another run itself")
    for check in (*case.checks, *(c for control in case.controls for c in control.checks)):
        if isinstance(check, Band) and check.reference not in case.golden:
            raise _Wrong(f"band around {check.reference}: only golden runs have a measured noise")


class _Table:
    """A mapping of the file from which keys are taken one by one, so that none is overlooked."""

    def __init__(self, name: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise _Wrong(f"{name} is {content!r} and not a mapping")
        self.name = name
        self._content = dict(content)

    def take(self, key: str, kind: Any, *default: Any) -> Any:
        """The value of a key, which must be there if no default is given."""
        if key not in self._content:
            if not default:
                raise _Wrong(f"{self.name} has no {key!r}")
            return default[0]
        value = self._content.pop(key)
        if not _fits(value, kind):
            raise _Wrong(f"{self.name}: {key} cannot be {value!r}")
        return value

    def take_list(self, key: str, kind: Any, *default: Any) -> tuple[Any, ...]:
        """The values of a list, which has at least one, and none twice."""
        values = self.take(key, list, *default)
        if not values or not all(_fits(value, kind) for value in values):
            raise _Wrong(f"{self.name}: {key} cannot be {values!r}")
        if len(set(values)) < len(values):
            raise _Wrong(f"{self.name}: {key} has a value twice: {values!r}")
        return tuple(values)

    def finish(self) -> None:
        """Refuses what nobody took."""
        if self._content:
            raise _Wrong(f"{self.name}: unknown {', '.join(map(repr, self._content))}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; all numbers of a case are positive."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) and (not isinstance(value, int | float) or 0 < value < math.inf)
