"""The scripts without a job: what they would run, what they refuse, how they are written."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.project import ROOT
from tests.slurm.cluster import SCRIPTS

SCRIPT = SCRIPTS / "pretrain.sbatch"


def dry_run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Calls the script outside Slurm, without the settings that this site may have."""
    outside = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**outside, "DRY_RUN": "1", "SITE_ENV": "/dev/null", **variables},
        cwd=ROOT,
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


def test_a_site_names_gpus_port_and_what_a_container_mounts(recipe: Path, tmp_path: Path) -> None:
    site, run = tmp_path / "site.env", tmp_path / "run"
    site.write_text("GPUS_PER_NODE=3\nMASTER_PORT=7\nCONTAINER_MOUNTS=(/data:/data:ro /scratch)\n")
    variables = {"SITE_ENV": str(site), "RUN_DIR": str(run)}
    assert "MASTER_PORT=7:" in dry_run(recipe, **variables).stdout
    assert not any(
        word.startswith("--container") for word in command_of(dry_run(recipe, **variables))
    )
    command = command_of(dry_run(recipe, CONTAINER_IMAGE="/images/torch.sqsh", **variables))
    assert "--ntasks=3" in command
    assert [word for word in command if re.match("--(no-)?container", word)] == [
        "--container-image=/images/torch.sqsh",
        f"--container-mounts={ROOT}:{ROOT},{run}:{run},/data:/data:ro,/scratch",
        f"--container-workdir={ROOT}",
        "--no-container-mount-home",
    ]


@pytest.mark.parametrize("own", [None, "32"])
def test_ranks_start_with_what_megatron_wants_of_hopper(tmp_path: Path, own: str | None) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $CUDA_DEVICE_MAX_CONNECTIONS\n")
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RANK_LOGS": str(tmp_path)}
    variables |= dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "GPUS_PER_NODE"), "0")
    variables |= {"LAUNCHER": "srun", "NODE_TMP": str(tmp_path), "SLURM_JOB_ID": "1"}
    if own:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = own
    subprocess.run(["bash", SCRIPTS / "rank.sh"], env=variables, check=True, capture_output=True)
    assert (tmp_path / "rank0.log").read_text() == f"{own or 1}\n"


def test_shipped_recipe_and_site_are_ready_for_use() -> None:
    done = dry_run("examples/quick_start.args", GPUS_PER_NODE="1", SITE_ENV="")
    assert "--swiglu" in command_of(done)


@pytest.mark.parametrize(
    ("text", "variables", "message"),
    [
        (None, {}, "no GPUs"),
        (None, {"GPUS_PER_NODE": "1", "LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: srun or torchrun"),
        (None, {"SITE_ENV": "no/such.env"}, "cannot read SITE_ENV=no/such.env"),
        (None, {"GPUS_PER_NODE": "1", "DRY_RUN": ""}, "not in a Slurm job"),
        (None, {"SLURM_SUBMIT_DIR": "/"}, "/ has no pretrain_gpt.py"),
        ("--lr 1", {"GPUS_PER_NODE": "1"}, "no --train-iters"),
        ("--name 'a", {"GPUS_PER_NODE": "1"}, "is not a file of flags"),
    ],
)
def test_refusals(recipe: Path, text: str | None, variables: dict[str, str], message: str) -> None:
    if text is not None:
        recipe.write_text(text)
    done = dry_run(recipe, **variables)
    assert done.returncode == 1
    assert message in done.stderr
