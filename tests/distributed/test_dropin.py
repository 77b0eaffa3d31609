"""Scripts that know nothing of this project, with `--optimizer dion`."""

import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_dion.checkpointing.hashes import MANIFEST
from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion.optimizer.diagnostics import read_diagnostics
from tests.distributed.tiny_gpt import (
    DION,
    INSTANCES,
    MODEL,
    OVERLAP,
    PP2,
    TP2,
    TRAINING,
    losses,
    pretrain,
    records_of,
)
from tests.worlds import train, world

SCRIPT = Path(__file__).with_name("foreign_pretrain.py")
# The script has a default for the tokenizer.
FLAGS = [flag for flag in [*MODEL, *TRAINING] if flag not in ("--tokenizer-type", "NullTokenizer")]
RUN = "--tensor-model-parallel-size 2 --sequence-parallel --train-iters 4".split()
RANKS = 4
# megatron-core 0.18 has no config of a model that a script could give.
ON_EVERY_RELEASE = [*FLAGS, *DION, "--model-by", "provider", "--train-iters", "6"]

# What `--device cpu` stands for, in a script that nobody helps.
STOCK_ON_CPU = (
    "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion"
    " --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion --num-workers 0"
    " --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --use-cpu-initialization"
    " --async-strategy mcore"
).split()


def run_script(flags: Sequence[str]) -> None:
    """On a rank: what `python -m megatron_dion.run` does, where megatron is there already."""

    from megatron_dion.megatron.hooks import TrainingHooks

    TrainingHooks("cpu", script_is_ours=False).install()
    start_script(flags)


def run_stock(flags: Sequence[str]) -> None:
    """On a rank: the script alone."""
    from megatron_dion.megatron import patches

    patches.use_packaged_dataset_helpers()
    start_script(flags)


def start_script(flags: Sequence[str]) -> None:
    sys.argv = [str(SCRIPT), *flags]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def run_alone(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of Python's, in a process of its own."""
    command = [sys.executable, "-W", "ignore", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def complaint(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line of a mistake."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return line


def captured(run_dir: Path) -> list[tuple[int, dict[str, float | None]]]:
    """Of each measured iteration what its diagnostics say that matrices captured."""
    snapshots = read_diagnostics(read_metrics(run_dir / "metrics.jsonl"))
    return [(s.iteration, {m.name: m.captured for m in s.matrices}) for s in snapshots]


@pytest.mark.parametrize("model_by", ["config", pytest.param("provider", marks=pytest.mark.slow)])
def test_losses_are_those_of_our_script(tmp_path: Path, model_by: str) -> None:
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    measured = [*RUN, *DION, "--dion-log-interval", "2"]
    pretrain(RANKS, *measured, "--run-dir", str(own))
    flags = [*FLAGS, *measured, "--model-by", model_by, "--run-dir", str(foreign)]
    world(RANKS).fork(run_script, flags)
    assert losses(foreign) == losses(own)
    assert [iteration for iteration, _ in captured(foreign)] == [2, 4]
    assert captured(foreign) == captured(own)
    assert {path.name for path in foreign.iterdir()} == {path.name for path in own.iterdir()}
    assert (foreign / "routing.tsv").read_text() == (own / "routing.tsv").read_text()
    config = json.loads((foreign / "config.json").read_text())
    assert config["command_line"] == [str(SCRIPT), *flags]


def test_a_loss_of_another_name_is_left_out(tmp_path: Path) -> None:
    evaluate = "--eval-iters 1 --eval-interval 2".split()
    flags = [*FLAGS, *DION, *evaluate, "--train-iters", "2", "--run-dir", str(tmp_path)]
    world(1).fork(run_script, [*flags, "--loss-name", "cross entropy"])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["lm_loss"]) for line in lines] == [("train", None)] * 2
    assert all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.versions
def test_runs_without_dion_are_left_alone(tmp_path: Path) -> None:
    seen = {}
    on_cpu = ["--device", "cpu"]
    alone = [flag for flag in FLAGS if flag not in on_cpu] + STOCK_ON_CPU
    for name, run, flags in (("stock", run_stock, alone), ("ours", run_script, FLAGS)):
        lines, saved = tmp_path / f"{name}.txt", tmp_path / name
        flags = [*flags, *RUN, "--optimizer", "adam", "--use-distributed-optimizer"]
        flags += ["--model-by", "provider"]
        flags += ["--save", str(saved), "--load", str(saved), "--save-interval", "4"]
        world(RANKS).fork(run, [*flags, "--losses-file", str(lines)])
        files = {str(path.relative_to(saved)) for path in saved.rglob("*")}
        seen[name] = lines.read_text(), files
    assert seen["ours"] == seen["stock"]
    assert len(seen["ours"][0].splitlines()) == 8  # of two microbatches in each iteration


@pytest.mark.slow
@pytest.mark.versions
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    flags = [*FLAGS, *RUN, *DION, "--model-by", "provider"]
    saving = ["--save", str(saved), "--load", str(saved), "--save-interval", "2"]
    saving.append("--override-opt-param-scheduler")  # the first run is to be shorter
    for iterations in ("2", "4"):
        more = [*saving, "--train-iters", iterations, "--run-dir", str(tmp_path / "cut")]
        world(RANKS).fork(run_script, [*flags, *more])
    world(RANKS).fork(run_script, [*flags, "--run-dir", str(tmp_path / "whole")])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert (saved / "iter_0000004" / MANIFEST).exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the script in one process, with a checkpoint of its third iteration."""
    folder = tmp_path_factory.mktemp("alone")
    saving = ["--save", str(folder), "--save-interval", "3", "--run-dir", str(folder / "run")]
    world(1).fork(run_script, [*ON_EVERY_RELEASE, *saving])
    return folder


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize(
    ("ranks", "grid"),
    [
        (2, ""),
        (4, f"{TP2} {OVERLAP}"),
        (4, f"{PP2} {OVERLAP}"),
        (4, f"{INSTANCES} --tensor-model-parallel-size 2"),
    ],
)
def test_the_script_goes_on_the_same_on_every_grid(
    alone: Path, tmp_path: Path, ranks: int, grid: str
) -> None:
    loading = ["--load", str(alone), "--ckpt-step", "3", "--run-dir", str(tmp_path)]
    world(ranks).fork(run_script, [*ON_EVERY_RELEASE, *grid.split(), *loading])
    differences = [
        abs(a - b) for a, b in zip(losses(tmp_path), losses(alone / "run")[3:], strict=True)
    ]
    assert max(differences) < 2e-5
    assert (tmp_path / "routing.tsv").read_text() == (alone / "run/routing.tsv").read_text()


@pytest.mark.slow
@pytest.mark.versions
def test_compressed_sync_and_adamw_in_a_script(alone: Path, tmp_path: Path) -> None:
    """The norm that compressed sync estimates is that of all gradients; states can be switched."""
    norms = []
    for name, more in (("whole", ""), ("compressed", "--dion-compressed-sync")):
        flags = [*ON_EVERY_RELEASE, *INSTANCES.split(), *more.split()]
        world(2).fork(run_script, [*flags, "--run-dir", str(tmp_path / name)])
        norms.append(records_of(tmp_path / name)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.3)
    assert norms[1] != norms[0]
    switch = ["--load", str(alone), "--ckpt-step", "3", "--switch-optimizer", "--optimizer", "adam"]
    adam = tmp_path / "adam"
    world(2).fork(run_script, [*ON_EVERY_RELEASE, *switch, "--run-dir", str(adam)])
    assert losses(adam)[0] == pytest.approx(losses(alone / "run")[3], abs=2e-5)
    assert losses(adam)[1:] != losses(alone / "run")[4:]


def train_on_all_mock_documents(flags: Sequence[str]) -> None:
    """On a rank: `tests.worlds` has fewer of them."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 100000
    train(flags)


def test_torchrun_starts_it(tmp_path: Path) -> None:
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    flags = [*RUN, *DION]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    started = [*launcher, "-m", "megatron_dion.run", str(SCRIPT), *FLAGS, *flags]
    ended = run_alone(*started, "--run-dir", str(foreign))
    assert ended.returncode == 0, ended.stderr[-3000:]
    all_flags = [*MODEL, *TRAINING, *flags, "--run-dir", str(own)]
    world(RANKS).fork(train_on_all_mock_documents, all_flags)
    assert losses(foreign) == losses(own)


def test_a_script_may_install_it_itself(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import megatron_dion\n"
        "megatron_dion.install()\n"
        "megatron_dion.install()\n"
        f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    flags = [*FLAGS, *DION, "--train-iters", "1"]
    refused = run_alone(str(script), *flags, "--dion-rank-fraction", "2")
    assert "--dion-rank-fraction must be in (0, 1], not 2.0" in complaint(refused)


def test_too_late(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import megatron.core\nimport megatron_dion\nmegatron_dion.install()\n")
    assert "megatron has been imported already" in complaint(run_alone(str(script)))


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (None, 2, "script.py is not a file"),
        ("from beside import WORD; import sys; print(WORD, __name__, sys.argv[1:])\nexit(7)", 7,
         "beside __main__ ['--device', 'cpu', 'a b']"),
        # What Python makes of the signal, which a process in the background is not given.
        pytest.param("raise KeyboardInterrupt", 130, "interrupted", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_started_as_if_by_itself(tmp_path: Path, body: str | None, code: int, said: str) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    if body is not None:
        (tmp_path / "script.py").write_text(body)
    script = str(tmp_path / "script.py")
    ended = run_alone("-m", "megatron_dion.run", script, "--device", "cpu", "a b")
    assert ended.returncode == code
    assert said in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def refusal(flags: Sequence[str]) -> str:
    """On a rank: why the script does not start."""
    from megatron_dion.megatron.errors import ConfigurationError

    try:
        run_script(flags)
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--optimizer dion", "--optimizer dion needs --use-distributed-optimizer"),
        ("--optimizer dion --use-distributed-optimizer --inprocess-restart", "--inprocess-restart"),
    ],
)
def test_refusals(flags: str, named: str) -> None:
    [said] = world(1).fork(refusal, [*FLAGS, "--train-iters", "1", *flags.split()])
    assert named in said
