"""Recipes on all their topologies, and what is refused before anything is submitted."""

import contextlib
import io
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_dion_tools import cli, launch
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.launch import Recipe
from tests.worlds import world

RECIPES = sorted(Path("examples", "recipes").glob("*.yaml"))
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 32000".split()


def complaints_about(
    runs: Sequence[tuple[Sequence[str], int]],
    connections: str | None = None,
    capabilities: Sequence[float] = launch.CAPABILITIES,
) -> list[str]:
    """On a rank: what runs would be refused with, or nothing."""
    os.environ.pop(CONNECTIONS, None)
    if connections is not None:
        os.environ[CONNECTIONS] = connections
    complaints = []
    for flags, gpus in runs:
        try:
            launch.check(flags, gpus, capabilities)
            complaints.append("")
        except ToolError as error:
            complaints.append(str(error))
    return complaints


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_all_their_topologies(path: Path) -> None:
    recipe = Recipe.read(path)
    runs = [([*recipe.flags(gpus), *DATA], gpus) for gpus in recipe.topologies]
    assert world(1).fork(complaints_about, runs) == [[""] * len(runs)]
    assert max(recipe.topologies) >= 64


def test_connections_that_hopper_dies_of_are_refused() -> None:
    [path] = [path for path in RECIPES if path.stem == "gpt_8b"]
    runs = [([*Recipe.read(path).flags(8), *DATA], 8)]
    [[complaint]] = world(1).fork(complaints_about, runs, "8")
    assert f"{CONNECTIONS} to 1 (on compute capability 9.0, where it is 8; " in complaint
    assert world(1).fork(complaints_about, runs, "8", [10.0]) == [[""]]
    assert world(1).fork(complaints_about, runs, "1") == [[""]]
    # Data parallelism alone takes any number.
    path = path.with_stem("gpt_1b")
    runs = [([*Recipe.read(path).flags(8), *DATA], 8)]
    assert world(1).fork(complaints_about, runs, "8") == [[""]]


@pytest.mark.parametrize(
    ("name", "gpus", "more", "named"),
    [
        ("gpt_8b", 8, "--global-batch-size 510", "must be divisible by eval_micro"),
        ("gpt_8b", 8, "--tensor-model-parallel-size 3", "not divisible by total_model_size"),
        ("gpt_8b", 8, "--no-such-flag", "--no-such-flag"),
        ("gpt_70b", 64, "--num-layers 82", "number of layers"),
        ("gpt_8b", 8, "--dion-rank-fraction 2", "--dion-rank-fraction"),
    ],
)
def test_mistakes_are_named_before_anything_queues(
    name: str, gpus: int, more: str, named: str
) -> None:
    [path] = [path for path in RECIPES if path.stem == name]
    runs = [([*Recipe.read(path).flags(gpus), *DATA, *more.split()], gpus)]
    [[complaint]] = world(1).fork(complaints_about, runs)
    assert named in complaint
    assert "\n" not in complaint


@pytest.mark.parametrize("nodes", [3, 0])
def test_other_numbers_of_gpus_are_refused(nodes: int) -> None:
    with pytest.raises(ToolError, match=f"no topology for {nodes} GPUs, only for .*--nodes"):
        cli.call(f"launch {RECIPES[0]} --gpus-per-node 1 --nodes {nodes}".split())


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


def output_of_dry_run(words: str) -> str:
    """On a rank: what the command prints, or the mistake that it ends with."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            assert cli.call(["launch", *words.split()]) == 0
        except ToolError as error:
            return f"error: {error}"
    return said.getvalue()


def test_a_dry_run_prints_what_would_be_submitted(tmp_path: Path) -> None:
    words = f"{RECIPES[0]} --nodes 8 --dry-run --gpus-per-node 4 --run-dir {tmp_path}"
    words += " --sbatch-flag=--time=1:00 --"
    [said] = world(1).fork(output_of_dry_run, f"{words} {' '.join(DATA)}")
    last = shlex.split(said.splitlines()[-1])
    assert last[0] == "sbatch"
    assert {"--nodes=8", "--gpus-per-node=4", "--time=1:00"} <= set(last)
    assert last[-2:] == [str(launch.SCRIPT), str(tmp_path / "recipe.args")]
    assert list(tmp_path.iterdir()) == []
    [said] = world(1).fork(output_of_dry_run, f"{words} --bogus")
    assert said.startswith("error: unrecognized arguments: --bogus")
