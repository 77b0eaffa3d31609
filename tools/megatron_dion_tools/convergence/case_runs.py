"""Trains the runs of a case, keeps golden curves, and applies the checks."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dion.megatron.run_directory import read_metrics, replace_file
from megatron_dion_tools.convergence.case import Case, Check
from megatron_dion_tools.convergence.checks import Verdict, follows
from megatron_dion_tools.convergence.curves import GRAD_NORM, LOSS, Curves, read_curves
from megatron_dion_tools.convergence.environment import describe
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.flags import effective
from megatron_dion_tools.local.runs import Run, execute

Golden = Mapping[str, Mapping[int, Curves]]
"""Curves by name of run and by seed, which somebody has accepted."""

_GOLDEN_KEYS = ("kind", "iteration", LOSS, GRAD_NORM)


class CaseRuns:
    """The runs of a case on this machine, each in the folder RUN/seed-N of a folder."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self._folder = folder
        self._data = case.prepare_data()

    def train(
        self, names: Sequence[str], seeds: Sequence[int], jobs: int, report: Callable[[str], None]
    ) -> None:
        """Train runs from the beginning, since the code may have changed, after their parents.

        At most `jobs` ranks run at a time; `report` takes lines of progress.

        Raises:
            RunFailed: A run failed.
        """
        first = dict.fromkeys(self.case.runs[name].continues or name for name in names)
        for batch in (list(first), [name for name in names if name not in first]):
            runs = [self.run(name, seed) for name in batch for seed in seeds]
            for run in runs:
                run.remove()
            execute(runs, jobs, report)

    def run(self, name: str, seed: int) -> Run:
        """Return a run of the case with a seed."""
        spec, folder = self.case.runs[name], self._folder / name / f"seed-{seed}"
        flags = (*self.case.common_flags, "--seed", str(seed), *self._data, *spec.flags)
        saved = [r.at for r in self.case.runs.values() if r.continues == name and r.at]
        if spec.continues:
            parent = self._folder / spec.continues / f"seed-{seed}" / "checkpoints"
            flags = (*flags, "--load", str(parent), "--ckpt-step", str(spec.at))
        elif saved:
            interval = str(math.gcd(*saved))
            flags = (*flags, "--save", str(folder / "checkpoints"), "--save-interval", interval)
        patch = spec.patch and str(self.case.path.parent / spec.patch)
        return Run(f"{name}, seed {seed}", folder, effective(flags), spec.processes, patch)

    def read_golden(self) -> Golden:
        """Read the golden curves.

        Raises:
            ToolError: There are none.
        """
        golden: dict[str, dict[int, Curves]] = {}
        for name in self.case.golden:
            for seed in self.case.seeds:
                path = self.case.golden_folder / name / f"seed-{seed}.jsonl"
                if not path.exists():
                    raise ToolError(
                        f"{path}: no such file: `convergence update` makes golden curves"
                    )
                golden.setdefault(name, {})[seed] = read_curves(path, f"golden {name}")
        return golden

    def write_golden(self) -> None:
        """Make the curves of the trained golden runs the golden ones.

        Raises:
            ToolError: A number is not finite. Nothing was written.
        """
        environment = describe((*self.case.common_flags, *self._data))
        texts = {"environment.json": json.dumps(environment, indent=2) + "\n"}
        for name in self.case.golden:
            for seed in self.case.seeds:
                run = self.run(name, seed)
                records = [r for r in read_metrics(run.metrics) if LOSS in r]
                if not all(math.isfinite(r[LOSS] or math.nan) for r in records):
                    raise ToolError(f"{run.name}: a loss is not finite: it cannot become golden")
                lines = [{key: r[key] for key in _GOLDEN_KEYS if key in r} for r in records]
                texts[f"{name}/seed-{seed}.jsonl"] = "".join(f"{json.dumps(x)}\n" for x in lines)
        for file, text in texts.items():
            path = self.case.golden_folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)

    def verdicts(self, golden: Golden) -> Iterator[Verdict]:
        """Apply all checks to trained runs, first that golden runs follow their golden curves.

        Raises:
            ToolError: A run has no such curve.
        """
        first = self.case.seeds[0]
        for name in self.case.golden:
            check = Check((name,), name, self.case.golden_share)
            yield from self._compare(check, name, golden[name][first], golden)
        for check in self.case.checks:
            for name in check.runs:
                reference = self._curves(check.reference)
                verdicts = list(self._compare(check, name, reference, golden))
                if check.notices:  # One quantity that shows the mistake is enough.
                    verdicts = sorted(verdicts, key=lambda verdict: not verdict.is_good)[:1]
                yield from verdicts

    def _compare(
        self, check: Check, name: str, reference: Curves, golden: Golden
    ) -> Iterator[Verdict]:
        after = self.case.runs[name].at or 0
        seeds = list(golden.get(check.reference, {}).values())
        for quantity in check.quantities:
            verdict = follows(
                self._curves(name), reference, quantity, check.share, seeds, after=after
            )
            yield replace(verdict, notices=check.notices)

    def _curves(self, name: str) -> Curves:
        return read_curves(self.run(name, self.case.seeds[0]).folder, name)
