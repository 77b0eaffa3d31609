"""Applies the checks of a case to the curves of its runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dion_tools.convergence import checks
from megatron_dion_tools.convergence.case import Band, Below, Case, Check, Exact, RunSpec
from megatron_dion_tools.convergence.checks import Verdict
from megatron_dion_tools.convergence.curves import GRAD_NORM, LOSS, Curves
from megatron_dion_tools.convergence.environment import Environment, different_data, same_arithmetic
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.convergence.golden import Golden
from megatron_dion_tools.convergence.trainer import Trainer, Wanted


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: the case.
        verdicts: of its checks.
        controls: of the runs with a known mistake; each of them should have failed.
    """

    case: Case
    verdicts: Sequence[Verdict]
    controls: Sequence[Verdict]

    @property
    def passed(self) -> bool:
        """Whether all checks passed and all mistakes were noticed."""
        return all(v.passed for v in self.verdicts) and not any(v.passed for v in self.controls)


def wanted_by_checks(case: Case, with_controls: bool) -> list[Wanted]:
    """The runs, with their seeds, that checks need."""
    named = dict.fromkeys(case.golden)
    for check in case.checks:
        named |= {check.run: None, check.reference: None}
    if with_controls:
        named |= {check.reference: None for c in case.controls for check in c.checks}
    runs = [(case.runs[name], seed) for name in named for seed in case.seeds_of(name)]
    return runs + [(c.run, case.seeds[0]) for c in case.controls if with_controls]


def wanted_by_golden(case: Case) -> list[Wanted]:
    """The runs that become golden, with all seeds."""
    return [(case.runs[name], seed) for name in case.golden for seed in case.seeds]


def evaluate(
    trainer: Trainer, golden: Golden, environment: Environment, with_controls: bool
) -> Outcome:
    """Apply all checks of a case to what was trained.

    Args:
        trainer: has trained what `wanted_by_checks` names.
        golden: curves of the case.
        environment: of this machine.
        with_controls: whether runs with a known mistake were trained, too.

    Raises:
        ConvergenceError: the golden curves are of other data, or a run has no curves.
    """
    judge = _Judge(trainer, golden, environment)
    case = trainer.case
    verdicts = [v for name in case.golden for v in judge.against_golden(name)]
    verdicts += [v for check in case.checks for v in judge.check(check)]
    controls = list(judge.controls()) if with_controls else []
    return Outcome(case, verdicts, controls)


def require_comparable(trainer: Trainer, golden: Golden, environment: Environment) -> None:
    """Refuse golden curves of other runs than those that would be trained here.

    Raises:
        ConvergenceError: data or flags are others, or there are no such curves.
    """
    name, update = trainer.case.name, "`update` makes new ones"
    if other := different_data(golden.environment, environment):
        raise ConvergenceError(
            f"{name}: the golden curves were made with other {' and '.join(other)}: "
            f"prepare the same, or {update}"
        )
    for run in trainer.case.golden:
        if trainer.case.seeds[0] not in golden.curves.get(run, {}):
            raise ConvergenceError(f"{name}: there are no golden curves of {run}: {update}")
        before, now = golden.commands.get(run), trainer.command(trainer.case.runs[run])
        if before != now:
            raise ConvergenceError(
                f"{name}: the golden curves of {run} were made with other flags: {update}; "
                f"then {before!r}, now {now!r}"
            )


class _Judge:
    def __init__(self, trainer: Trainer, golden: Golden, environment: Environment) -> None:
        require_comparable(trainer, golden, environment)
        self._trainer = trainer
        self._case = trainer.case
        self._golden = golden
        self._same_arithmetic = same_arithmetic(golden.environment, environment)

    def against_golden(self, name: str) -> Iterator[Verdict]:
        """On the same software and processor bit for bit, elsewhere within the usual band."""
        seed = self._case.seeds[0]
        fresh = self._curves(self._case.runs[name], seed)
        before = self._golden.curves[name][seed]
        after = self._case.runs[name].at or 0
        for quantity in (LOSS, GRAD_NORM):
            if self._same_arithmetic:
                yield checks.exact(fresh, before, quantity, after)
            else:
                yield self._band(fresh, before, name, checks.SHARE, quantity, after)

    def check(self, check: Check) -> Iterator[Verdict]:
        """A verdict for each quantity."""
        run, reference = self._case.spec(check.run), self._case.spec(check.reference)
        seed, after = self._case.seeds[0], run.at or 0
        for quantity in check.quantities:
            match check:
                case Exact():
                    yield checks.exact(
                        self._curves(run, seed), self._curves(reference, seed), quantity, after
                    )
                case Band():
                    fresh = self._curves(run, seed), self._curves(reference, seed)
                    yield self._band(*fresh, check.reference, check.share, quantity, after)
                case Below():
                    yield checks.below(
                        [self._curves(run, seed) for seed in self._case.seeds],
                        [self._curves(reference, seed) for seed in self._case.seeds],
                        check.at,
                        quantity,
                    )

    def controls(self) -> Iterator[Verdict]:
        """A verdict for each check that must notice a mistake, in either of its quantities."""
        for control in self._case.controls:
            for check in control.checks:
                yield _first_failure(list(self.check(check)))

    def _curves(self, spec: RunSpec, seed: int) -> Curves:
        return self._trainer.curves(spec, seed)

    def _band(
        self, run: Curves, reference: Curves, name: str, share: float, quantity: str, after: int
    ) -> Verdict:
        return checks.band(run, reference, self._golden.seeds(name), share, quantity, after)


def _first_failure(verdicts: Sequence[Verdict]) -> Verdict:
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return failed[0] if failed else verdicts[0]
