"""The rank advisor on spectra whose answer is known."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_dion import Dion
from megatron_dion.megatron.run_directory import MetricsFile
from megatron_dion.optimizer.diagnostics import (
    ENERGY_LEVELS,
    MatrixDiagnostics,
    Snapshot,
    to_record,
)
from megatron_dion_tools.cli import call
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.report.advisor import Need, advise, describe, need_of, read_run


def with_energies(energies: Tensor, seed: int) -> Tensor:
    """A square matrix with these squared singular values."""
    n = len(energies)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed + i)))[0]
        for i in range(2)
    )
    return left * energies.sqrt() @ right.T


def diagnose(gradients: list[Tensor], rank_fraction: float, steps: int = 1) -> Snapshot:
    """Measures the last of some steps with the same gradients and no momentum."""
    weights = {f"layers.{i}.w": Parameter(torch.zeros_like(g)) for i, g in enumerate(gradients)}
    optimizer = Dion(weights.items(), lr=0, momentum=0.0, rank_fraction=rank_fraction)
    for _ in range(steps):
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient.clone()
            optimizer.state[weight].get("momentum", torch.zeros(())).zero_()
        optimizer.take_diagnostics()
        optimizer.diagnose_next_step()
        optimizer.step()
    return Snapshot(1, tuple(optimizer.take_diagnostics()))


def measured(name: str, captured: float | None, ranks: Any, **shape: int) -> MatrixDiagnostics:
    shape = {"rows": 64, "columns": 64, "rank": 16} | shape
    none = captured is None
    return MatrixDiagnostics(
        name=name,
        captured=captured,
        stable_rank=None if none else 4.0,
        orthonormality_error=1e-6,
        update_rms=0.0,
        update_norm=0.0,
        momentum_norm=0.0,
        owner_seconds=0.0,
        energy_ranks=ranks,
        **shape,
    )


def test_rank_of_a_known_spectrum() -> None:
    """Energies 2^-k: k directions have 1 - 2^-k of it, so 90 % need 4 and 99 % need 7."""
    energies = 2.0 ** -torch.arange(32)
    snapshot = diagnose([with_energies(energies, seed=0)], rank_fraction=1.0)
    advice = advise([snapshot], 0.9)
    assert advice.matrices[0].need == Need(4, is_bound=False)
    assert advice.matrices[0].fraction == 4 / 32
    assert advise([snapshot], 0.99).matrices[0].need == Need(7, is_bound=False)


def test_a_flat_spectrum_needs_what_the_bound_says() -> None:
    """Of 40 equal energies 90 % need 36 directions, though the run has only 10."""
    snapshot = diagnose([with_energies(torch.ones(40), seed=0)], rank_fraction=0.25)
    assert advise([snapshot], 0.9).matrices[0].need == Need(36, is_bound=True)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("steps", [1, 10])
def test_needs_are_never_below_the_best_directions(
    decay: float, fraction: float, steps: int
) -> None:
    energies = torch.arange(1, 41).float() ** -decay
    snapshot = diagnose([with_energies(energies, seed=3)], fraction, steps)
    shares = energies.cumsum(0) / energies.sum()
    for level in ENERGY_LEVELS:
        need = need_of(snapshot.matrices[0], level)
        best = int((shares < level - 1e-5).sum()) + 1
        assert need is not None
        assert need.directions >= best
        if not need.is_bound:
            # Some steps of power iteration have found nearly the best ones.
            assert steps == 1 or need.directions <= best + 3


def test_model_is_weighted_by_parameters() -> None:
    levels = (1, 2, None, None, None)
    small = [measured(f"layers.{i}.w", 0.99, (1, 1, 1, 2, 3)) for i in range(3)]
    large = measured("layers.0.v", 0.99, (2, 4, 8, 9, 16), rows=256)  # 4 of 7 parts of parameters
    advice = advise([Snapshot(1, (*small, large))], 0.9)
    assert advice.fraction_for(0.4).fraction == 1 / 64
    assert advice.fraction_for(0.5).fraction == 8 / 64
    assert advise([Snapshot(1, (small[0],))], 0.9).fraction_for(1.0).fraction == 1 / 64
    assert need_of(measured("w", math.sqrt(0.8), levels), 0.9) == Need(16 + 24, is_bound=True)


def test_middle_of_the_steps_counts() -> None:
    steps = [Snapshot(i, (measured("w", 0.99, (1, 1, k, k, k)),)) for i, k in enumerate((9, 3, 5))]
    assert advise(steps, 0.9).matrices[0].need == Need(5, is_bound=False)


def test_matrices_without_energy_are_left_out() -> None:
    matrices = (measured("zero", None, (None,) * 5), measured("w", 0.99, (1, 1, 2, 2, 2)))
    advice = advise([Snapshot(1, matrices)], 0.9)
    assert [found.last.name for found in advice.matrices] == ["w"]
    assert "1 matrices had no energy and are left out" in describe(advice)


def write_run(folder: Path, snapshots: list[Snapshot]) -> Path:
    metrics = MetricsFile(folder / "metrics.jsonl", iterations_done=0)
    for snapshot in snapshots:
        metrics.append(to_record(snapshot))
        metrics.append({"kind": "train", "iteration": snapshot.iteration})
    return folder


def advise_from_command_line(*argv: str) -> None:
    call(["advise", *argv])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        Snapshot(i, (measured("layers.0.w", 0.99, (1, 1, k, k, k)),))
        for i, k in ((10, 60), (20, 60), (30, 16), (40, 16))
    ]
    write_run(tmp_path, steps)
    advise_from_command_line(str(tmp_path))
    said = capsys.readouterr().out
    assert "2 measured steps of iterations 30 to 40, 1 matrices" in said
    assert "0.25 in all matrices" in said
    assert "layers.*.w" in said
    assert "Captured energy is not loss" in said
    advise_from_command_line(str(tmp_path), "--from-iteration", "0")
    assert "0.94 in all matrices" in capsys.readouterr().out


def test_command_says_where_only_a_bound_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, [Snapshot(1, (measured("w", math.sqrt(0.8), (4, 9, None, None, None)),))])
    advise_from_command_line(str(tmp_path))
    said = capsys.readouterr().out
    assert "<= 0.63 in all matrices" in said  # 16 and at most 24 more of 64
    assert "train some iterations with a larger --dion-rank-fraction" in said


@pytest.mark.parametrize(
    ("snapshots", "argv", "complaint"),
    [
        (None, [], "there is no"),
        ([], [], "has no diagnostics: train with --dion-log-interval N"),
        (
            [Snapshot(8, ())],
            ["--from-iteration", "9"],
            "after the last diagnostics, of iteration 8",
        ),
        ([Snapshot(8, (measured("w", None, (None,) * 5),))], [], "no matrix had any energy"),
    ],
)
def test_nothing_to_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    snapshots: list[Snapshot] | None,
    argv: list[str],
    complaint: str,
) -> None:
    if snapshots is not None:
        write_run(tmp_path, snapshots)
    with pytest.raises(ToolError, match=re.escape(complaint)):
        advise_from_command_line(str(tmp_path), *argv)
    assert capsys.readouterr().out == ""


def test_second_half_is_read_by_default(tmp_path: Path) -> None:
    empty = [Snapshot(i, (measured("w", None, (None,) * 5),)) for i in range(1, 6)]
    found = read_run(write_run(tmp_path, empty), None)
    assert [snapshot.iteration for snapshot in found] == [3, 4, 5]
