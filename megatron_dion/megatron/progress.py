"""What a run says about itself on the terminal."""

import argparse
import math

from megatron_dion.megatron.run_directory import Record


def say(text: str) -> None:
    """Print lines of the project's own."""
    for line in text.splitlines():
        print(f"[dion] {line}", flush=True)


def describe_processes(args: argparse.Namespace) -> str:
    """One line that says how many processes train, on what, and what they are divided into."""
    names = {"tensor_model": "TP", "pipeline_model": "PP", "context": "CP", "data": "DP"}
    sizes = {short: getattr(args, f"{name}_parallel_size") for name, short in names.items()}
    division = " x ".join(f"{short}{size}" for short, size in sizes.items() if size > 1)
    if args.expert_model_parallel_size > 1:  # of the same ranks
        division += f", experts over {args.expert_model_parallel_size}"
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    device = "CPU (no GPU is used)" if args.device == "cpu" else "CUDA"
    return f"{processes} on {device}" + (f": {division}" if division else "")


def progress_line(
    record: Record,
    train_iters: int,
    validation: Record | None,
    tokens_per_second: float,
    seconds_left: float,
) -> str:
    """Describe one training record in one line, and the last validation record in the same."""
    parts = [
        f"iteration {record['iteration']:{len(str(train_iters))}d}/{train_iters}",
        f"loss {_number(record['lm_loss'], '.4f')}",
        describe_validation(validation),
        f"lr {_number(record['lr'], '.2e')}",
        f"grad norm {_number(record['grad_norm'], '.3f')}",
        f"{human_count(tokens_per_second)} tokens/s",
        f"{human_duration(seconds_left)} left",
    ]
    return " | ".join(filter(None, parts))


def describe_validation(record: Record | None) -> str:
    """The last validation loss and its iteration, which may have been long ago; or nothing."""
    return f"validation {record['lm_loss']:.4f} at {record['iteration']}" if record else ""


def human_count(count: float) -> str:
    """Three significant digits and a suffix: 950, 12.3k, 4.56M."""
    for suffix in ("", "k", "M", "G"):
        if count < 999.5:
            digits = 0 if not suffix else max(0, 2 - int(math.log10(max(count, 1))))
            return f"{count:.{digits}f}{suffix}"
        count /= 1000
    return f"{count:.0f}T"


def human_duration(seconds: float) -> str:
    """The two largest units: 42 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 24 * 3600:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // (24 * 3600)} d {total % (24 * 3600) // 3600} h"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
