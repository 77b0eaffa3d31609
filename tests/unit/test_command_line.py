"""Mistakes on a real command line: a line that names them, and exit code 2, before training."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from megatron_dion.megatron import launch
from tests.distributed.tiny_gpt import DION, MODEL, TRAINING, losses, records_of
from tests.unit.test_validation import write_data
from tests.worlds import world

RUN = [*MODEL, *TRAINING, "--train-iters", "3"]


def exit_of(argv: list[str]) -> tuple[object, str]:
    """On a rank: the exit code of pretrain_gpt.py's main and what it says on stderr."""
    from megatron_dion.megatron.launch import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(argv)
        except SystemExit as end:
            return end.code, said.getvalue()
    return 0, said.getvalue()


def exit_of_rank(argv: list[str]) -> tuple[object, str]:
    """On a rank: as `exit_of`, and all that it says; none waits for a launcher to end it."""
    from megatron_dion.megatron import errors

    errors._LAUNCHER_GRACE_SECONDS = 0.0
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code, complaint = exit_of(argv)
    return code, said.getvalue() + complaint


def output_of(argv: list[str]) -> str:
    """On a rank: what a run says."""
    return exit_of_rank(argv)[1]


def test_interrupt_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "train", interrupted)
    with pytest.raises(SystemExit) as end:
        launch.main([])
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def complaint(*argv: str) -> str:
    [(code, said)] = world(1).fork(exit_of, [*RUN, *argv])
    assert code == 2
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    return line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--dion-rank-fraction 0", "--dion-rank-fraction must be in (0, 1], not 0.0"),
        ("--dion-rnk-fraction 1", "unrecognized arguments: --dion-rnk-fraction 1 (see --help)"),
        ("--dion-oversample 1.5", "--dion-oversample was removed: "),
        ("--dion-exclude nothing.*", "no parameter's name matches 'nothing.*'"),
        ("--tensor-model-parallel-size 3", "megatron refuses these arguments: "),
        ("--data-path {}", "--mock-data does not go with the data {}"),
        ("--load {}", "--load {} holds no complete checkpoint"),
        ("--pretrained-checkpoint {}", "--pretrained-checkpoint {} holds no complete checkpoint"),
        ("--run-dir {}/file/x", "--run-dir {}/file/x cannot be made: [Errno 20]"),
        (
            "--save {}/file/x --save-interval 1",
            "--save {}/file/x cannot be made: [Errno 20]",
        ),
    ],
)
def test_mistakes_end_with_one_line(tmp_path: Path, flags: str, named: str) -> None:
    (tmp_path / "file").touch()
    line = complaint(*DION, *flags.format(tmp_path).split())
    assert named.format(tmp_path) in line


def test_length_in_samples(tmp_path: Path) -> None:
    argv = [*MODEL, *TRAINING, *DION, "--train-samples", "36", "--run-dir", str(tmp_path)]
    argv = [word for word in argv if word not in ("--lr-decay-iters", "20")]
    argv[argv.index("--lr-warmup-iters") : argv.index("--lr-warmup-iters") + 2] = []
    [(code, said)] = world(1).fork(exit_of, argv)
    assert code == 0, said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_what_a_run_says(tmp_path: Path) -> None:
    save = ["--save", str(tmp_path), "--save-interval", "2"]
    evaluate = ["--eval-iters", "1", "--eval-interval", "2", "--log-interval", "1"]
    said, _ = world(2).fork(output_of, [*RUN, *DION, *save, *evaluate])
    lines = [line for line in said.splitlines() if line.startswith("[dion] ")]
    assert lines[0] == "[dion] 2 processes on CPU (no GPU is used)"
    saved = [line for line in lines if "saved" in line]
    for line, iteration in zip(saved, (2, 3), strict=True):
        folder = tmp_path / f"iter_{iteration:07d}"
        found = re.fullmatch(
            rf"\[dion\] {folder}: saved iteration {iteration}, ([\d.]+) MB in [\d.]+ s", line
        )
        assert found
        size = sum(path.stat().st_size for path in folder.glob("*.distcp")) / 1e6
        assert float(found[1]) == pytest.approx(size, rel=0.1)


def train_on(data: str, run_dir: Path) -> str:
    """What one process says that trains on data files."""
    argv = [word for word in RUN if word != "--mock-data"]
    argv += [*DION, *data.split(), "--num-layers", "1", "--run-dir", str(run_dir)]
    [(code, said)] = world(1).fork(exit_of_rank, argv)
    assert code == 0, said[-3000:]
    return said


def test_cached_indices_of_other_data_are_made_anew(tmp_path: Path) -> None:
    """Megatron by itself would train on the first documents only."""
    documents = [[(7 * i + j) % 240 for j in range(40)] for i in range(60)]
    prefix = write_data(tmp_path / "data", documents[:20])
    data = f"--data-path {prefix} --split 1,0,0"
    assert "built anew" not in train_on(data, tmp_path / "one")
    write_data(tmp_path / "data", documents)
    assert f"[dion] {prefix} has changed" in train_on(data, tmp_path / "other")
    assert "has changed" not in train_on(data, tmp_path / "again")
    write_data(tmp_path / "new", documents)
    train_on(data.replace("data --", "new --"), tmp_path / "new-run")
    one, other, new = (losses(tmp_path / name) for name in ("one", "other", "new-run"))
    assert one != other == new


def test_several_validation_sets_are_recorded_by_name(tmp_path: Path) -> None:
    for name, step in (("train", 7), ("wiki", 1), ("code", 0)):
        write_data(tmp_path / name, [[step * i % 240 for i in range(40)]] * 30)
    train = f"--train-data-path {tmp_path / 'train'}"
    valid = f"--valid-data-path {tmp_path / 'wiki'} {tmp_path / 'code'} --eval-interval 2"
    flags = f"{train} {valid} --full-validation --multiple-validation-sets"
    for number, (names, found) in enumerate([("", "01"), ("wiki code", ("wiki", "code"))]):
        folder = tmp_path / str(number)
        train_on(f"{flags} --validation-set-names {names}" if names else flags, folder)
        lines = records_of(folder, "validation")
        keys = [f"lm_loss-{name}" for name in found]
        assert [(line["iteration"], *line.keys() & {*keys}) for line in lines] == [
            (iteration, key) for iteration in (2, 3) for key in keys
        ]
        assert lines[0][keys[0]] != lines[1][keys[1]]
