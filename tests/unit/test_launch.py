"""Recipes on all their topologies, and what is refused before anything is submitted."""

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_dion_tools import launch
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.launch import Recipe
from tests.distributed.nursery import Nursery

RECIPES = sorted(Path("examples", "recipes").glob("*.yaml"))
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 32000".split()


def complaint_about(flags: Sequence[str], gpus: int) -> str:
    """On a rank: what the run would be refused with, or nothing."""
    from megatron_dion.megatron.errors import ConfigurationError
    from megatron_dion.megatron.pretrain import check_arguments

    with contextlib.redirect_stdout(None):
        try:
            check_arguments(flags, "cuda", gpus)
        except ConfigurationError as error:
            return str(error)
    return ""


def complaints_about(runs: Sequence[tuple[Sequence[str], int]]) -> list[str]:
    return [complaint_about(flags, gpus) for flags, gpus in runs]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_all_their_topologies(nursery: Nursery, path: Path) -> None:
    recipe = Recipe.read(path)
    runs = [([*recipe.flags(gpus), *DATA], gpus) for gpus in recipe.topologies]
    [found] = nursery.run(1, complaints_about, runs)
    assert found == [""] * len(runs)
    assert max(recipe.topologies) >= 64


def test_size_of_the_vocabulary_may_be_left_to_the_tokenizer(nursery: Nursery) -> None:
    flags = Recipe.read(RECIPES[0]).flags(8)
    data = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model elsewhere --data-path there"
    assert nursery.run(1, complaint_about, [*flags, *data.split()], 8) == [""]


@pytest.mark.parametrize(
    ("name", "gpus", "more", "named"),
    [
        ("gpt_8b", 8, "--global-batch-size 510", "--global-batch-size 510 is not a multiple of"),
        ("gpt_8b", 8, "--tensor-model-parallel-size 3", "need a multiple of 3 processes, not 8"),
        ("gpt_8b", 16, "--tensor-model-parallel-size 16 --num-query-groups 5", "5"),
        ("gpt_8b", 8, "--no-such-flag", "--no-such-flag"),
        ("gpt_70b", 64, "--num-layers 82", "number of layers"),
        ("gpt_8b", 8, "--dion-rank-fraction 2", "--dion-rank-fraction"),
        ("gpt_8b", 8, "--use-precision-aware-optimizer", "--use-precision-aware-optimizer"),
        ("gpt_8b", 8, "--fp8-param-gather", "--fp8-format"),
    ],
)
def test_mistakes_are_named_before_anything_queues(
    nursery: Nursery, name: str, gpus: int, more: str, named: str
) -> None:
    [path] = [path for path in RECIPES if path.stem == name]
    flags = [*Recipe.read(path).flags(gpus), *DATA, *more.split()]
    [complaint] = nursery.run(1, complaint_about, flags, gpus)
    assert named in complaint
    assert "\n" not in complaint


def test_other_numbers_of_gpus_are_refused() -> None:
    recipe = Recipe.read(RECIPES[0])
    with pytest.raises(ToolError, match="no topology for 3 GPUs, only for"):
        recipe.flags(3)


@pytest.mark.parametrize("text", ["a: [", "a: 1", "- description", ""])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ToolError, match=str(path)):
        Recipe.read(path)


def test_rendered_flags_come_back() -> None:
    recipe = Recipe.read(RECIPES[0])
    flags = [*recipe.flags(max(recipe.topologies)), "--data-path", "a b", "c"]
    text = launch.render(recipe, flags, 8)
    assert shlex.split(text, comments=True) == flags
    assert all(line.startswith(("--", "#")) for line in text.splitlines())


def test_a_dry_run_prints_what_would_be_submitted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_dion", "launch"]
    command += [str(RECIPES[0]), "--nodes", "8", "--dry-run"]
    command += ["--gpus-per-node", "4", "--run-dir", str(tmp_path), "--sbatch-flag=--time=1:00"]
    answer = subprocess.run([*command, "--", *DATA], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    last = shlex.split(answer.stdout.splitlines()[-1])
    assert last[0] == "sbatch"
    assert {"--nodes=8", "--gpus-per-node=4", "--time=1:00"} <= set(last)
    assert last[-2:] == [str(launch.SCRIPT), str(tmp_path / "recipe.args")]
    assert list(tmp_path.iterdir()) == []
    refused = subprocess.run([*command, "--", "--bogus"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "error: unrecognized arguments: --bogus" in refused.stderr
