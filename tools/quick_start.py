"""Pretrain a small GPT with Dion on real text: data, tokenizer and training in one command.

What is already there and has the right hashes is reused. Flags after `--` go to pretrain_gpt.py
and win over those of examples/quick_start.args.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_dion.error_line import PREFIX
from megatron_dion_tools.data.prepared import Data, data_flags, prepare
from megatron_dion_tools.errors import ToolError, run_tool
from megatron_dion_tools.local.flags import read_flags

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ROOT / "examples" / "quick_start.args"

PROGRESS_MARK = "[dion] "
# Where the long report begins that torchrun ends with; it says only that a process failed,
LAUNCHER_MARK = "torch/distributed/elastic"
# and ends with the exit code of the one that failed first.
EXIT_CODE = re.compile(r"^  exitcode  : (-?\d+) ", re.MULTILINE)
LOG_LINES_SHOWN = 30
# With this a run ends that did not begin; what was wrong is told in one line.
REFUSED = 2
# Only the end is saved, unless training takes longer than it does here.
SAVE_INTERVAL = 300


@dataclass(frozen=True)
class Layout:
    """How many processes train, and how many of them share each layer."""

    processes: int
    tensor_parallel: int
    sequence_parallel: bool = False


def count_cuda_devices() -> int:
    """Return the number of CUDA devices, asked of another process to keep torch out of this one."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise ToolError(f"torch does not work: {answer.stderr.strip().splitlines()[-1]}")
    return int(answer.stdout)


def choose_layout(cuda_devices: int, has_engine: bool) -> Layout:
    """Return TP2 x DP2 on CPU or four devices, and what fits where there are fewer devices.

    On CUDA Megatron's norms do sequence parallelism only with Transformer Engine.
    """
    if cuda_devices == 1:
        return Layout(processes=1, tensor_parallel=1)
    processes = 2 if cuda_devices in (2, 3) else 4
    return Layout(processes, tensor_parallel=2, sequence_parallel=has_engine or not cuda_devices)


def training_command(
    data: Data, run_dir: Path, layout: Layout, overrides: Sequence[str]
) -> list[str]:
    """Return the command that trains."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(layout.processes), str(ROOT / "pretrain_gpt.py")]
    paths = [*data_flags(data), "--run-dir", str(run_dir)]
    paths += ["--save", str(run_dir / "checkpoints"), "--save-interval", str(SAVE_INTERVAL)]
    spread = ["--tensor-model-parallel-size", str(layout.tensor_parallel)]
    if layout.sequence_parallel:
        spread.append("--sequence-parallel")
    return [*launcher, *read_flags(ARGUMENTS), *paths, *spread, *overrides]


def train(command: Sequence[str], log: Path) -> None:
    """Run the training, its whole output in `log` and its progress lines on the terminal.

    If it fails, show why and exit with its status.

    Args:
        command: trains.
        log: in a folder of its own, which a run that was refused does not leave behind.
    """
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            # Megatron insists on it for tensor parallelism on most CUDA devices.
            env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as child,
    ):
        assert child.stdout is not None
        try:
            relay(child.stdout, file)
        except BaseException:
            child.terminate()  # or the processes it started would train on, unseen
            raise
    if child.returncode != 0:
        text = log.read_text(encoding="utf-8")
        status, errors = status_of(text, child.returncode), errors_in(text)
        if status == REFUSED and errors and not (log.parent / "metrics.jsonl").exists():
            shutil.rmtree(log.parent)
        else:
            print(f"training ended with status {status}; the whole log is {log}", file=sys.stderr)
        print("\n".join(errors or last_lines(text)), file=sys.stderr)
        sys.exit(status)


def relay(output: Iterable[str], log: TextIO) -> None:
    """Copy output to the log, and its progress lines to the terminal."""
    for line in output:
        log.write(line)
        log.flush()
        if line.startswith(PROGRESS_MARK):
            print(line.removeprefix(PROGRESS_MARK), end="", flush=True)


def errors_in(log: str) -> list[str]:
    """Return the lines with errors that the training named, each once."""
    return list(dict.fromkeys(line for line in log.splitlines() if line.startswith(PREFIX)))


def last_lines(log: str) -> list[str]:
    """Return the end of what the training said, before torchrun's report."""
    lines = log.splitlines()
    report = (number for number, line in enumerate(lines) if LAUNCHER_MARK in line)
    return lines[: next(report, len(lines))][-LOG_LINES_SHOWN:]


def status_of(log: str, launcher_status: int) -> int:
    """Return the exit code of the process that failed first; torchrun itself ends with 1."""
    codes = [int(code) for code in EXIT_CODE.findall(log)] or [launcher_status]
    return codes[-1] if codes[-1] > 0 else 1


def report_command(command: Sequence[str]) -> str:
    """Return the command that makes a page of what a command trained, as it can be typed here."""
    program = Path(sys.executable).with_name("megatron-dion")
    run_dir = ROOT / values_of(command).run_dir
    return shlex.join([os.path.relpath(program), "report", os.path.relpath(run_dir)])


def resume_command(command: Sequence[str], overrides: Sequence[str]) -> str:
    """Return the command that goes on from the last checkpoint, for as many iterations again."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--load")
    parser.add_argument("--train-iters", type=int)
    parser.add_argument("--override-opt-param-scheduler", action="store_true")
    _, kept = parser.parse_known_args(overrides)
    trained = values_of(command)
    flags = [*kept, "--load", os.path.relpath(ROOT / trained.save, ROOT)]
    flags += ["--train-iters", str(2 * trained.train_iters), "--override-opt-param-scheduler"]
    return f"make train ARGS={shlex.quote(shlex.join(flags))}"


def values_of(command: Sequence[str]) -> argparse.Namespace:
    """Return what a command says of where it saves and reports, and how long it trains."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--save")
    parser.add_argument("--run-dir")
    parser.add_argument("--train-iters", type=int)
    return parser.parse_known_args(command)[0]


def make_run_dir(runs: Path) -> Path:
    """Make and return a new folder named after the time."""
    run_dir = runs / time.strftime("%Y%m%d-%H%M%S")
    run_dir.mkdir(parents=True)
    return run_dir


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="-- FLAG", help="more flags for pretrain_gpt.py"
    )
    overrides = parser.parse_args().overrides
    data = Data(ROOT / "data")
    prepare(data)
    run_dir = make_run_dir(ROOT / "runs")
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    layout = choose_layout(count_cuda_devices(), has_engine)
    print(f"starting {layout.processes} processes; log: {run_dir / 'train.log'}", flush=True)
    command = training_command(data, run_dir, layout, overrides)
    train(command, run_dir / "train.log")
    print(f"to look at it: {report_command(command)}")
    print(f"to go on, on other ranks too: {resume_command(command, overrides)}")


if __name__ == "__main__":
    run_tool(main)
