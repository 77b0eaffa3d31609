"""What runs have come to, in words and figures: the head of the page."""

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from statistics import median

from megatron_dion.megatron.run_directory import Record
from megatron_dion_tools.convergence.curves import LOSS
from megatron_dion_tools.report.charts import short
from megatron_dion_tools.report.folder import RunFolder

_ROSE = 0.1
"""The share of its whole fall by which a loss that rises again has gone wrong."""
_PARALLELISM = {
    "TP": "tensor_model",
    "PP": "pipeline_model",
    "CP": "context",
    "EP": "expert_model",
    "DP": "data",
}


def verdict(run: RunFolder) -> str:
    """Say whether the run has ended, and whether its loss fell."""
    planned = run.config["arguments"]["train_iters"]
    if not run.training:
        return "No iteration was recorded: the run has not begun, or it failed before. See its log."
    last = run.training[-1]["iteration"]
    state = "Unfinished, running or stopped" if planned and last < planned else "Finished"
    end = f"{state}: iteration {last:,}" + (f" of {planned:,}" if planned else "")
    return f"{end}. {_outcome(run)}"


def _outcome(run: RunFolder) -> str:
    if not run.loss:
        return "It has no finite training loss."
    if not math.isfinite(last(run.curve(LOSS))):
        return f"Diverged: the training loss is not finite after iteration {[*run.loss][-1]:,}."
    losses = [*run.loss.values()]
    first, end, lowest = losses[0], losses[-1], min(losses)
    if end - lowest > _ROSE * (first - lowest):
        at = [*run.loss][losses.index(lowest)]
        return f"The training loss rose again, from {lowest:.3f} in iteration {at:,} to {end:.3f}."
    tenth = losses[-1 - len(losses) // 10] - end
    return (
        f"The training loss fell from {first:.3f} to {end:.3f}, in the last tenth by {tenth:.2g}."
    )


def comparison(run: RunFolder, other: RunFolder, name: str) -> str:
    """Say, after a verdict, how soon a run was where another ended, and which ended lower."""
    if not (run.loss and other.loss):
        return ""
    end, target = [*other.loss.items()][-1]
    there = next((iteration for iteration, loss in run.loss.items() if loss <= target), None)
    said = f" It {'reaches' if there else 'does not reach'} {name}’s last training loss"
    if there:
        time = run.elapsed[there] / other.elapsed[end]
        said += f" in {there / end:.0%} of the iterations and {time:.0%} of the time"
    for of_set, theirs in other.validation.items():
        ours = run.validation.get(of_set, {})
        if both := ours.keys() & theirs.keys():
            lower = theirs[max(both)] - ours[max(both)]
            how = f"{abs(lower):.2g} {'lower' if lower > 0 else 'higher'}" if lower else "the same"
            said += f"; its validation loss{of_set} in iteration {max(both):,} is {how}"
    return f"{said}."


def last(curve: dict[int, float]) -> float:
    """The last value of a curve that has one."""
    *_, value = curve.values()
    return value


def notes(run: RunFolder) -> Iterator[str]:
    """What the reader has to know before looking at curves."""
    if run.is_cut:
        yield "The last line of metrics.jsonl is cut off: the run was killed, or it is writing."
    if broken := [i for i, loss in run.curve(LOSS).items() if not math.isfinite(loss)]:
        yield f"The training loss is not finite in {_iterations(broken)}."
    if skipped := [record["iteration"] for record in run.training if record.get("skipped")]:
        yield f"The step was skipped in {_iterations(skipped)}: gradients were not finite."
    if run.training and (first := run.training[0]["iteration"]) > 1:
        yield f"Curves begin at iteration {first:,}: earlier ones are in another run directory."
    for iteration in run.resumed_after:
        yield f"The run was resumed after iteration {iteration:,}."


def _iterations(numbers: Sequence[int]) -> str:
    more = len(numbers) - 1
    return f"iteration {numbers[0]:,}" + (f" and {more:,} more" if more else "")


def facts(run: RunFolder) -> Iterator[tuple[str, str]]:
    """The numbers that readers ask for first."""
    args = run.config["arguments"]
    words = [args["optimizer"]]
    if args["optimizer"] == "dion":
        words += [f"rank fraction {args['dion_rank_fraction']:g}"]
        words += ["residual"] if args.get("dion_residual", "none") != "none" else []
    yield "optimizer", ", ".join(words)
    if run.routes:
        numels = {route: math.prod(route.size) for route in run.routes}
        share = sum(n for route, n in numels.items() if route.rank) / sum(numels.values())
        yield "updated by Dion", f"{share:.1%} of the elements"
    if run.loss:
        yield "training loss", f"{last(run.loss):.3f}"
    for name, curve in run.validation.items():
        yield f"validation loss{name}", f"{last(curve):.3f}"
    if run.training:
        newest = run.training[-1]
        seconds = run.elapsed[newest["iteration"]]
        step = sum(record["optimizer_seconds"] for record in run.training)
        yield "tokens", short(newest["tokens"])
        if speeds := run.speeds:
            yield "tokens/s, median", short(median(speeds.values()))
        time = timedelta(seconds=round(seconds))
        yield "time, in optimizer", f"{time}, {step / seconds:.1%}"
        yield "sent per step", f"{short(newest['optimizer_bytes'] / 1e6)} MB"
    if run.starts:
        yield "ranks", ranks(run.starts[-1])


def ranks(start: Record) -> str:
    """Their number, and how they are divided."""
    sizes = {name: start[f"{long}_parallel_size"] for name, long in _PARALLELISM.items()}
    divided = " × ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    return ": ".join(filter(None, [str(start["world_size"]), divided]))
