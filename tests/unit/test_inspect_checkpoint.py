"""What the tool says of checkpoints; those that are damaged are in tests/distributed."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, train

SMALL = "--num-layers 2 --seq-length 16 --max-position-embeddings 16 --train-iters 2".split()


def inspect(nursery: Nursery, folder: Path, *flags: str) -> tuple[int, str]:
    """The exit code of the tool, and all that it says."""
    [(code, said)] = nursery.run(1, exit_of_tool, [str(folder), *flags])
    assert "Traceback" not in said, said
    return code, said


def exit_of_tool(argv: list[str]) -> tuple[int, str]:
    """In a process that has imported Megatron already."""
    from megatron_dion_tools import cli

    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(said),
    ):
        try:
            cli.main(["inspect", *argv])
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


def test_from_the_command_line(folders: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "megatron_dion", "inspect", str(folders[0]), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.rstrip().endswith("iter_0000002 is whole")


@pytest.fixture(scope="module")
def folders(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoints of a run with Dion and of one with Adam."""
    made = []
    for name, flags in (
        ("dion", [*DION, "--dion-momentum-dtype", "bf16", "--dion-rank-fraction", "0.5"]),
        ("adam", ["--optimizer", "adam"]),
    ):
        folder = tmp_path_factory.mktemp(name)
        argv = [*MODEL, *TRAINING, *SMALL, "--lr-warmup-iters", "0", *flags]

        nursery.run(1, train, [*argv, "--save", str(folder), "--save-interval", "2"])
        made.append(folder)
    return made[0], made[1]


def test_of_dion(nursery: Nursery, folders: tuple[Path, Path]) -> None:
    code, said = inspect(nursery, folders[0], "--verify")
    assert code == 0, said
    assert "iteration   2" in said
    assert "optimizer   dion, after 2 steps\nand         adam, after 2 steps" in said
    assert "saved by    1 ranks, TP1 PP1 EP1" in said
    assert "rank_fraction 0.5" in said
    assert "split       gate, qkv" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("decoder.layers.")]
    assert len(rows) == 14
    name, m, n, rank, types, *norms = rows[0]
    assert name == "decoder.layers.0.mlp.linear_fc1.weight[gate]"
    assert (m, n, rank, types) == ("200", "72", "36", "fp32/bf16/fp32")
    assert all(float(norm) > 0 for norm in norms)
    assert len(norms) == 3
    assert said.rstrip().endswith("iter_0000002 is whole")


def test_without_norms(nursery: Nursery, folders: tuple[Path, Path]) -> None:
    code, said = inspect(nursery, folders[0] / "iter_0000002", "--no-norms")
    assert code == 0
    assert "|weight|" not in said
    assert "decoder.layers.0.mlp.linear_fc1.weight[gate]" in said


def test_of_adam(nursery: Nursery, folders: tuple[Path, Path]) -> None:
    code, said = inspect(nursery, folders[1], "--verify")
    assert code == 0
    assert "optimizer   adam" in said
    assert "decoder.layers" not in said


def test_nothing_there(nursery: Nursery, tmp_path: Path) -> None:
    code, said = inspect(nursery, tmp_path)
    assert code == 2
    assert f"error: {tmp_path} holds no checkpoint" in said


def test_other_step(nursery: Nursery, folders: tuple[Path, Path]) -> None:
    code, said = inspect(nursery, folders[0], "--ckpt-step", "7")
    assert code == 2
    assert "iter_0000007 is not there: choose another with --ckpt-step (complete: 2)" in said
