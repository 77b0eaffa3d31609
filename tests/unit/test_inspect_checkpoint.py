"""What the tool says of checkpoints; those that are damaged are in tests/distributed."""

import contextlib
import io
from pathlib import Path

import pytest

from megatron_dion_tools import cli
from tests.distributed.tiny_gpt import MODEL, TRAINING
from tests.project import ROOT
from tests.worlds import world

DION = ROOT / "tests" / "data" / "checkpoint_6012ac3"
SMALL = "--num-layers 2 --seq-length 16 --max-position-embeddings 16 --train-iters 2".split()


def inspect(folder: Path, *flags: str) -> tuple[int, str]:
    """The exit code of the tool, and all that it says."""
    [(code, said)] = world(1).fork(exit_of_tool, [str(folder), *flags])
    assert "Traceback" not in said, said
    return code, said


def exit_of_tool(argv: list[str]) -> tuple[int, str]:
    """In a process that has imported Megatron already."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(said),
    ):
        try:
            cli.main(["inspect", *argv])
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


@pytest.mark.parametrize("verify", [False, True])
def test_of_dion(verify: bool) -> None:
    code, said = inspect(DION, *(["--verify"] if verify else []))
    assert code == 0, said
    assert "iteration   4" in said
    assert "optimizer   dion, after 4 steps\nand         adam, after 4 steps" in said
    assert "saved by    4 ranks, TP2 PP1 EP1" in said
    assert "rank_fraction 0.25" in said
    assert "split       gate, qkv" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("decoder.layers.")]
    assert len(rows) == 17
    name, m, n, rank, types = rows[0]
    assert name == "decoder.layers.0.mlp.linear_fc1.weight[gate]"
    assert (m, n, rank, types) == ("88", "60", "15", "fp32")
    assert said.rstrip().endswith("iter_0000004 is whole") == verify


def test_of_adam(tmp_path: Path) -> None:
    argv = [*MODEL, *TRAINING, *SMALL, "--lr-warmup-iters", "0", "--optimizer", "adam"]
    world(1).train(*argv, "--save", str(tmp_path), "--save-interval", "2")
    code, said = inspect(tmp_path / "iter_0000002", "--verify")
    assert code == 0
    assert "optimizer   adam" in said
    assert "decoder.layers" not in said


@pytest.mark.parametrize(
    ("folder", "flags", "complaint"),
    [
        (ROOT / "docs", [], f"error: {ROOT / 'docs'} holds no complete checkpoint"),
        (
            DION,
            ["--ckpt-step", "7"],
            "was never finished: choose another with --ckpt-step (complete: 4)",
        ),
    ],
)
def test_nothing_there(folder: Path, flags: list[str], complaint: str) -> None:
    code, said = inspect(folder, *flags)
    assert code == 2
    assert complaint in said
