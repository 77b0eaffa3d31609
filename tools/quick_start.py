"""Pretrain a small GPT with Dion on real text: data, tokenizer and training in one command.

What is already there and has the right hashes is reused. Flags after `--` go to pretrain_gpt.py
and win over those of examples/quick_start.args.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_dion.error_line import PREFIX
from megatron_dion_tools.data.prepared import Data, data_flags, prepare
from megatron_dion_tools.errors import ToolError, run_tool
from megatron_dion_tools.local.flags import read_flags

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ROOT / "examples" / "quick_start.args"
# Lines of ours, and those of Megatron about iterations and evaluations.
PROGRESS = re.compile(r"(\[dion\] ).*|.* (iteration +\d+/|loss at iteration ).*", re.DOTALL)
# Here the long report of torchrun begins, which says only that a process failed.
LAUNCHER_MARK = "torch/distributed/elastic"
LOG_LINES_SHOWN = 30


def count_cuda_devices() -> int:
    """Return the number of CUDA devices, asked of another process to keep torch out of this one."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise ToolError(f"torch does not work: {answer.stderr.strip().splitlines()[-1]}")
    return int(answer.stdout)


def training_command(
    data: Data, run_dir: Path, cuda_devices: int, overrides: Sequence[str]
) -> list[str]:
    """Return the command that trains, with TP2 x DP2 on CPU or on at least four CUDA devices."""
    processes = {1: 1, 2: 2, 3: 2}.get(cuda_devices, 4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(processes), str(ROOT / "pretrain_gpt.py")]
    flags = [*read_flags(ARGUMENTS), *data_flags(data), "--run-dir", str(run_dir)]
    # The default number of iterations: only the end is saved.
    flags += ["--save", str(run_dir / "checkpoints"), "--save-interval", "300"]
    flags += ["--tensor-model-parallel-size", str(min(processes, 2))]
    return [*launcher, *flags, *overrides]


def train(command: Sequence[str], log: Path) -> None:
    """Run the training, its whole output in `log` and its progress lines on the terminal.

    If the training fails, show why and exit with its status.

    Args:
        command: Trains.
        log: In a folder of its own, which a run that was refused does not leave behind.
    """
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            # Megatron insists on it for tensor parallelism on GPUs before Blackwell.
            env={"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                file.write(line)
                file.flush()
                if match := PROGRESS.fullmatch(line):
                    print(line.removeprefix(match[1] or ""), end="", flush=True)
        except BaseException:
            child.terminate()  # or the processes that it started would train on, unseen
            raise
    if child.returncode != 0:
        errors, last_lines = explain(log.read_text(encoding="utf-8"))
        if errors and not (log.parent / "metrics.jsonl").exists():
            shutil.rmtree(log.parent)
        else:
            print(f"training failed; the whole log is {log}", file=sys.stderr)
        print("\n".join(errors or last_lines), file=sys.stderr)
        sys.exit(child.returncode)


def explain(log: str) -> tuple[list[str], list[str]]:
    """Return the errors that ranks named, each once, and what they said last."""
    lines = log.splitlines()
    errors = dict.fromkeys(line for line in lines if line.startswith(PREFIX))
    report = (number for number, line in enumerate(lines) if LAUNCHER_MARK in line)
    return list(errors), lines[: next(report, len(lines))][-LOG_LINES_SHOWN:]


def next_commands(command: Sequence[str], overrides: Sequence[str]) -> tuple[str, str]:
    """Return what can be typed after a training: one to see it, one to train as long again."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in ("--save", "--run-dir", "--train-iters"):
        parser.add_argument(flag)
    trained, _ = parser.parse_known_args(command)
    program = Path(sys.executable).with_name("megatron-dion")
    report = [os.path.relpath(program), "report", os.path.relpath(ROOT / trained.run_dir)]
    flags = [*overrides, "--load", os.path.relpath(ROOT / trained.save, ROOT), "--train-iters"]
    flags += [str(2 * int(trained.train_iters)), "--override-opt-param-scheduler"]
    return shlex.join(report), f"make train ARGS={shlex.quote(shlex.join(flags))}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = "more flags for pretrain_gpt.py"
    parser.add_argument("overrides", nargs="*", metavar="-- FLAG", help=what)
    overrides = parser.parse_args().overrides
    data = Data(ROOT / "data")
    prepare(data)
    run_dir = ROOT / "runs" / time.strftime("%Y%m%d-%H%M%S")
    command = training_command(data, run_dir, count_cuda_devices(), overrides)
    run_dir.mkdir(parents=True)
    print(f"training; log: {run_dir / 'train.log'}", flush=True)
    train(command, run_dir / "train.log")
    report, resume = next_commands(command, overrides)
    print(f"to look at it: {report}")
    print(f"to go on, on other ranks too: {resume}")


if __name__ == "__main__":
    run_tool(main)
