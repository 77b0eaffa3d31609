"""The shipped script, unchanged, on a Slurm cluster of two nodes."""

import csv
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from megatron_dion.checkpointing.folders import tracked
from megatron_dion.platforms import free_port
from tests.distributed.tiny_gpt import DION, MODEL, TRAINING, losses
from tests.slurm.cluster import SCRIPTS, Cluster, Job, wait_for

pytestmark = pytest.mark.slow

ITERATIONS = 60
SAVE_INTERVAL = 20
RECIPE = [
    *MODEL, *TRAINING, *DION, "--num-layers", "2", "--train-iters", str(ITERATIONS),
    "--save-interval", str(SAVE_INTERVAL),
]  # fmt: skip
SCRIPT = SCRIPTS / "pretrain.sbatch"
# Node names do not resolve here, and job ids, of which ports are made, begin at 1 in each cluster.
SITE = """
PATH={python.parent}:$PATH
MASTER_ADDR=127.0.0.1
MASTER_PORT={port}
NODE_TMP={folder}
"""
# Survivors of a killed rank hang in these tests; whoever waits for them waits for ever.
SECONDS_TO_FAIL = 20.0


class Run:
    """A run directory, and jobs that train in it."""

    def __init__(self, cluster: Cluster, folder: Path, site: str = "") -> None:
        self.cluster = cluster
        self.folder = folder / "run"
        self.checkpoints = self.folder / "checkpoints"
        self._recipe = folder / "recipe.args"
        self._recipe.write_text("# a tiny model\n" + " ".join(RECIPE) + "  # that's all\n")
        self._site = folder / "site.env"
        own = SITE.format(python=Path(sys.executable), port=free_port(), folder=folder)
        self._site.write_text(own + site)

    def submit(self, *flags: str, nodes: int = 2, gpus: int = 1, **variables: str) -> Job:
        return self.cluster.submit(
            self.folder.with_name("job.log"),
            *(f"--nodes={nodes}", f"--gpus-per-node={gpus}", "--time=60"),
            *(SCRIPT, self._recipe, *flags),
            RUN_DIR=str(self.folder),
            SITE_ENV=str(self._site),
            **variables,
        )

    def iterations(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return len(losses(self.folder)) if metrics.exists() else 0

    def history(self) -> list[dict[str, str]]:
        """The starts."""
        with (self.folder / "history.tsv").open() as file:
            return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="session")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Job]:
    """A run in one go, though a signal comes before it can hear it."""
    run = Run(cluster, tmp_path_factory.mktemp("whole"))
    job = run.submit()
    for rank in (0, 1):
        cache = f"{run.folder.parent}/compiled-{job.number}/triton"
        job.pid_of_rank(rank, local_rank=0, TRITON_CACHE_DIR=cache)
    job.signal("USR2")  # while the ranks import torch
    job.wait_for("COMPLETED")
    return run, job


def test_training_ends_and_leaves_its_records(whole: tuple[Run, Job]) -> None:
    run, job = whole
    assert job.said()[-1] == f"finished: iteration {ITERATIONS} of {ITERATIONS}"
    assert len(losses(run.folder)) == ITERATIONS
    (start,) = run.history()
    assert start["job"] == str(job.number)
    assert (start["restart"], start["tasks"], start["iteration"]) == ("0", "2", "0")
    assert (start["nodes"], start["image"]) == ("node[1-2]", "-")
    assert len(start["revision"].removesuffix("-dirty")) == 40
    assert "--swiglu" in (run.folder / "arguments.txt").read_text().splitlines()
    for rank in (0, 1):
        lines = (run.folder / "logs" / f"rank{rank}.log").read_text().splitlines()
        assert lines
        assert {f"{rank}: {line}" for line in lines} <= set(job.text().splitlines())


def test_early_signal_saves_requeues_and_goes_on(
    whole: tuple[Run, Job], cluster: Cluster, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path)
    job = run.submit(nodes=1, gpus=2)
    _signal_while_training(run, job)
    job.release()
    saved = tracked(run.checkpoints)
    job.wait_for("COMPLETED")
    assert [row["iteration"] for row in run.history()] == ["0", str(saved)]
    assert re.search(rf"successfully loaded checkpoint .* at iteration {saved}\b", job.text())
    assert losses(run.folder) == losses(whole[0].folder)
    requeued, finished = (line for line in job.said() if not line.startswith("start "))
    assert requeued.startswith(f"requeued at iteration {saved} of {ITERATIONS}, restart 1 of 20")
    assert finished == f"finished: iteration {ITERATIONS} of {ITERATIONS}"


def test_torchrun_passes_the_early_signal_on(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, "MAX_RESTARTS=0\n")
    job = run.submit(LAUNCHER="torchrun")
    _signal_while_training(run, job, local_rank=0)
    job.wait_for("FAILED")
    saved = tracked(run.checkpoints)
    assert job.said()[-1].startswith(f"not requeued at iteration {saved} of {ITERATIONS}: 0 of ")


def _signal_while_training(run: Run, job: Job, local_rank: int = 1) -> None:
    wait_for("training", lambda: run.iterations() > 2)
    assert job.pid_of_rank(1, local_rank)
    job.signal("USR2")
    wait_for("checkpoint", lambda: run.checkpoints.exists() and tracked(run.checkpoints))
    saved = tracked(run.checkpoints)
    assert isinstance(saved, int)
    assert saved % SAVE_INTERVAL, "it was not the signal that made this checkpoint"


def test_killed_rank_fails_the_job_fast_and_spends_the_budget(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path, "MAX_RESTARTS=1\n")
    # Each start has to come to a checkpoint that the one before had not.
    job = run.submit("--train-iters", "1000")
    _kill_after_next_checkpoint(run, job)
    wait_for("requeue", lambda: job.state() == "PENDING", SECONDS_TO_FAIL)
    job.release()
    _kill_after_next_checkpoint(run, job)
    job.wait_for("FAILED", SECONDS_TO_FAIL)
    assert [row["restart"] for row in run.history()] == ["0", "1"]
    assert "1 of MAX_RESTARTS=1 restarts are spent" in job.said()[-1]


def _kill_after_next_checkpoint(run: Run, job: Job) -> None:
    """Kills a rank, of which another takes no notice, as ranks in NCCL do."""
    before = tracked(run.checkpoints)
    wait_for("checkpoint", lambda: tracked(run.checkpoints) != before)
    os.kill(job.pid_of_rank(0, local_rank=0), signal.SIGSTOP)
    os.kill(job.pid_of_rank(1, local_rank=0), signal.SIGKILL)


def test_start_without_progress_is_the_last(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path)
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("40")  # and no checkpoint
    job = run.submit()
    job.wait_for("FAILED")
    assert job.said()[-1].startswith(
        f"not requeued at iteration 40 of {ITERATIONS}: this start, from iteration 40, saved no"
    )


def test_finished_training_is_not_started(whole: tuple[Run, Job]) -> None:
    run, _ = whole
    job = run.submit("--train-iters", str(ITERATIONS))
    job.wait_for("COMPLETED")
    assert job.said()[-1] == f"finished before: iteration {ITERATIONS} of {ITERATIONS}"


def test_dry_run_in_a_job_knows_its_end_and_its_nodes(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, "unset MASTER_ADDR MASTER_PORT\n")
    job = run.submit("--lr", "1", gpus=2, DRY_RUN="1")
    job.wait_for("COMPLETED")
    assert f"MASTER_ADDR=node1 MASTER_PORT={20000 + job.number}:" in job.text()
    assert re.search("--exit-duration-in-mins 5[45] ", job.text())
    assert "--nodes=2 --ntasks=4 --ntasks-per-node=2 " in job.text()
    assert not run.folder.exists()
