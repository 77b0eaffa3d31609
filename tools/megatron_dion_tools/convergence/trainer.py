"""Trains the runs of a case and reads their curves."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_dion_tools.convergence.case import Case, RunSpec
from megatron_dion_tools.convergence.curves import Curves, read_curves
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.local.flags import effective
from megatron_dion_tools.local.runs import Run, execute

Wanted = tuple[RunSpec, int]
"""A run and its seed."""


class Trainer:
    """The runs of a case on this machine.

    Args:
        case: the case.
        folder: where its runs go; each in a folder of its own.
        data: flags that name tokenizer and data.
    """

    def __init__(self, case: Case, folder: Path, data: Sequence[str]) -> None:
        self.case = case
        self.folder = folder
        self.data = tuple(data)

    def train(self, wanted: Iterable[Wanted], jobs: int, report: Callable[[str], None]) -> None:
        """Train runs, all of them from the beginning: the code may have changed since.

        What earlier calls trained is removed first, also of runs that are not wanted now.

        Args:
            wanted: runs and seeds; those that others continue are trained whether named or not.
            jobs: how many processes share the machine.
            report: takes a line of progress.

        Raises:
            RunFailed: a run failed.
        """
        self._forget_all()
        asked = dict.fromkeys(wanted)
        parents = [(self.case.runs[s.continues], seed) for s, seed in asked if s.continues]
        first = [pair for pair in dict.fromkeys([*parents, *asked]) if not pair[0].continues]
        then = [pair for pair in asked if pair[0].continues]
        for batch in (first, then):
            execute([self._run(spec, seed) for spec, seed in batch], jobs, report)

    def curves(self, spec: RunSpec, seed: int) -> Curves:
        """The curves of a trained run.

        Raises:
            ConvergenceError: it was not trained to its end with these flags.
        """
        run = self._run(spec, seed)
        if not run.is_finished():
            raise ConvergenceError(
                f"{self.case.name}: {run.name} was not trained to its end with its present flags: "
                "`check` trains it"
            )
        return read_curves(run.folder, run.name)

    def command(self, spec: RunSpec) -> str:
        """The flags of a run that decide its numbers: without seed, data and checkpoints."""
        return " ".join(effective((*self.case.flags, *spec.flags)))

    def _forget_all(self) -> None:
        mistakes = (control.run for control in self.case.controls)
        for spec in (*self.case.runs.values(), *mistakes):
            for seed in self.case.seeds:
                self._run(spec, seed).forget()

    def _run(self, spec: RunSpec, seed: int) -> Run:
        # A run's own flags come last: one with a wrong seed is a mistake to be noticed.
        own = (*self.case.flags, "--seed", str(seed), *self.data, *spec.flags)
        parent = str(self._folder_of(spec.continues or spec.name, seed) / "checkpoints")
        return Run(
            name=f"{spec.name}, seed {seed}",
            folder=self._folder_of(spec.name, seed),
            flags=effective((*own, *self._checkpoints(spec, parent))),
            processes=spec.processes,
            patch=spec.patch,
        )

    def _folder_of(self, name: str, seed: int) -> Path:
        return self.folder / name / f"seed-{seed}"

    def _checkpoints(self, spec: RunSpec, folder: str) -> tuple[str, ...]:
        if spec.continues is not None:
            return ("--load", folder, "--ckpt-step", str(spec.at))
        needed = [r.at for r in self.case.runs.values() if r.continues == spec.name and r.at]
        if not needed:
            return ()
        return ("--save", folder, "--save-interval", str(math.gcd(*needed)))
