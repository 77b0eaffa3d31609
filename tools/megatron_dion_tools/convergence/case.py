"""A case: runs, and what must be true of their curves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_dion_tools.convergence.checks import SHARE
from megatron_dion_tools.convergence.curves import GRAD_NORM, LOSS
from megatron_dion_tools.convergence.training_file import Flags, TrainingFile, read_training_file
from megatron_dion_tools.errors import ToolError


@dataclass(frozen=True)
class RunSpec:
    """One run of a case.

    Attributes:
        flags: Flags of pretrain_gpt.py after those that all runs of the case share.
        processes: Number of ranks.
        continues: Name of the run from whose checkpoint this run starts, if it does.
        at: Iteration of that checkpoint.
        patch: `FILE:FUNCTION`, a file beside the case, to break something before training.
    """

    flags: Flags = ()
    processes: int = 1
    continues: str | None = None
    at: int | None = None
    patch: str | None = None


@dataclass(frozen=True)
class Check:
    """What must be true of runs.

    Attributes:
        runs: Names of the runs.
        reference: Name of the run with which each of them is compared.
        share: The share of the seed noise around the reference by which a run may be away; with 0
            the run must repeat the reference bit for bit.
        quantities: The curves to compare.
        notices: Whether the runs have a planted mistake, so that the check must fail.
    """

    runs: tuple[str, ...]
    reference: str
    share: float = SHARE
    quantities: tuple[str, ...] = (LOSS, GRAD_NORM)
    notices: bool = False


@dataclass(frozen=True, kw_only=True)
class Case(TrainingFile):
    """What is trained, and what is compared how.

    All seeds measure the noise; checks compare runs with the first seed.

    Attributes:
        description: What the case is for.
        runs: The runs, by name.
        golden: Names of the runs whose curves are kept in the repository.
        checks: Between runs.
        golden_share: The share of the seed noise by which golden runs may leave their golden
            curves. In bf16, rounding alone, as on another processor, moves curves by most of one.
    """

    description: str
    runs: Mapping[str, RunSpec]
    golden: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    golden_share: float = SHARE

    @property
    def golden_folder(self) -> Path:
        """The folder of the golden curves."""
        return self.path.parent / "golden" / self.name


def read_case(path: Path) -> Case:
    """Read a case.

    Raises:
        ToolError: The file is not a case; the message names the file, the key and the value.
    """
    case = read_training_file(path, Case)
    for problem in _problems(case):
        raise ToolError(f"{path}: {problem}")
    return case


def _problems(case: Case) -> Iterator[str]:
    users = [(run, "golden") for run in case.golden]
    users += [(run, "a check") for check in case.checks for run in (*check.runs, check.reference)]
    users += [(spec.continues, f"run {name}") for name, spec in case.runs.items() if spec.continues]
    for run, user in users:
        if run not in case.runs:
            yield f"{user} names the run {run!r} (there are {', '.join(case.runs)})"
    for name, spec in case.runs.items():
        if (spec.continues is None) != (spec.at is None):
            yield f"run {name}: 'continues' and 'at' need each other"
        if spec.continues and case.runs[spec.continues].continues:
            yield f"run {name}: {spec.continues} itself continues another run"
        file, _, function = (spec.patch or "").partition(":")
        if spec.patch and not (function and (case.path.parent / file).is_file()):
            yield f"run {name}: patch {spec.patch!r} is not FILE:FUNCTION, a file beside the case"
    for check in case.checks:
        if check.share and check.reference not in case.golden:
            yield f"check around {check.reference}: only golden runs have a measured noise"
