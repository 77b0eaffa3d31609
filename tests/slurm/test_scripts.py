"""The scripts without a job: what they would run, what they refuse, how they are written."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import REPOSITORY, SCRIPTS, Cluster

SCRIPT = SCRIPTS / "pretrain.sbatch"


def dry_run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Calls the script outside Slurm, without the settings that this site may have."""
    outside = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**outside, "DRY_RUN": "1", "SITE_ENV": "/dev/null", **variables},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def command_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.args"
    path.write_text("# it's a comment\n--train-iters 50 --lr 1  # another\n--name 'a b#c'\n\n")
    return path


def test_dry_run_prints_the_command_and_does_nothing(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = dry_run(recipe, "--lr", "2 3", GPUS_PER_NODE="4", RUN_DIR=str(run))
    command = command_of(done)
    rank = command.index("bash")
    assert command[0] == "srun"
    assert {"--nodes=1", "--ntasks=4", "--kill-on-bad-exit=1", "--label"} <= set(command[:rank])
    assert command[rank + 1 :] == [
        str(SCRIPTS / "rank.sh"),
        *("--run-dir", str(run)),
        *("--save", f"{run}/checkpoints", "--load", f"{run}/checkpoints"),
        *("--exit-signal-handler", "--exit-signal", "SIGUSR2"),
        *("--train-iters", "50", "--lr", "1", "--name", "a b#c", "--lr", "2 3"),
    ]
    assert not run.exists()


def test_torchrun_is_one_task_per_node(recipe: Path) -> None:
    command = command_of(dry_run(recipe, GPUS_PER_NODE="4", LAUNCHER="torchrun"))
    assert {"--ntasks=1", "--ntasks-per-node=1"} <= set(command)


def test_flags_of_a_container_come_with_an_image(recipe: Path, tmp_path: Path) -> None:
    site, run = tmp_path / "site.env", tmp_path / "run"
    site.write_text("CONTAINER_MOUNTS=(/data:/data:ro /scratch)\n")
    variables = {"GPUS_PER_NODE": "1", "SITE_ENV": str(site), "RUN_DIR": str(run)}
    assert not any(
        word.startswith("--container") for word in command_of(dry_run(recipe, **variables))
    )
    command = command_of(dry_run(recipe, CONTAINER_IMAGE="/images/torch.sqsh", **variables))
    assert [word for word in command if re.match("--(no-)?container", word)] == [
        "--container-image=/images/torch.sqsh",
        f"--container-mounts={REPOSITORY}:{REPOSITORY},{run}:{run},/data:/data:ro,/scratch",
        f"--container-workdir={REPOSITORY}",
        "--no-container-mount-home",
    ]


def test_shipped_recipe_and_site_are_ready_for_use() -> None:
    done = dry_run("examples/quick_start.args", GPUS_PER_NODE="1", SITE_ENV="")
    assert "--swiglu" in command_of(done)


def test_another_site_file(recipe: Path, tmp_path: Path) -> None:
    site = tmp_path / "other.env"
    site.write_text("GPUS_PER_NODE=3\nMASTER_PORT=7\n")
    done = dry_run(recipe, SITE_ENV=str(site))
    assert "--ntasks=3" in command_of(done)
    assert "MASTER_PORT=7:" in done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "no GPUs"),
        ({"GPUS_PER_NODE": "1", "LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: srun or torchrun"),
        ({"GPUS_PER_NODE": "1", "SITE_ENV": "no/such.env"}, "cannot read SITE_ENV=no/such.env"),
        ({"GPUS_PER_NODE": "1", "DRY_RUN": ""}, "not in a Slurm job"),
        ({"GPUS_PER_NODE": "1", "SLURM_SUBMIT_DIR": "/"}, "/ has no pretrain_gpt.py"),
    ],
)
def test_refusals(recipe: Path, variables: dict[str, str], message: str) -> None:
    done = dry_run(recipe, **variables)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--lr 1", "no --train-iters"),
        ("--name 'a", "is not a file of flags"),
        (None, "cannot read"),
    ],
)
def test_refused_recipes(tmp_path: Path, text: str | None, message: str) -> None:
    recipe = tmp_path / "recipe.args"
    if text is not None:
        recipe.write_text(text)
    done = dry_run(recipe, GPUS_PER_NODE="1")
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.slow
def test_sbatch_would_start_it(cluster: Cluster, recipe: Path) -> None:
    cluster.run("sbatch", "--test-only", "--nodes=2", "--gpus-per-node=2", SCRIPT, recipe)
