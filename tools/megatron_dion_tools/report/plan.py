"""Of the report: what the planner says that ranks hold and send, from the run's arguments."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator

from megatron_dion.megatron.arguments import dion_config_from_args
from megatron_dion.megatron.errors import ConfigurationError
from megatron_dion.megatron.progress import human_count
from megatron_dion_tools.plan.flags import shape_from_arguments
from megatron_dion_tools.plan.hardware import PRESETS, Hardware
from megatron_dion_tools.plan.loads import Load, busiest_to_mean, loads
from megatron_dion_tools.plan.prediction import Prediction, predict
from megatron_dion_tools.plan.stage import Optimizer, Run, Stage
from megatron_dion_tools.plan.topology import Batch, Topology
from megatron_dion_tools.report.folder import RunFolder
from megatron_dion_tools.report.pages import Html, element, row, table

_MOST_RANKS = 64
_NOT_COUNTED = ("dion gradients", "dion gradient norm")
"""Sums of gradients, which come before the exchange that a run counts."""


def plan(run: RunFolder) -> list[Html]:
    """Memory and bytes of a step, or why they are not known."""
    try:
        planned, batch = planned_run(run.arguments)
        _check_matrices(run, planned)
        found = predict(planned, batch, _machine(run.config["platform"]))
    except (ValueError, AttributeError, ConfigurationError) as error:
        return [element("p", f"The planner does not know this run: {error}.", class_="none")]
    return [
        element("p", _INTRODUCTION),
        element("h3", "Memory of a rank"),
        _memory(found),
        element("h3", "Bytes that a rank sends in a step"),
        *_counted(run, found),
        _collectives(found),
        *_loads(Stage(planned, 0)),
    ]


_INTRODUCTION = (
    "Computed from the arguments, not measured; “most” is the rank that has most. Activations are"
    " a coarse estimate."
)


def _machine(platform: str) -> Hardware:
    """Only whether it is a CPU counts: times are not shown."""
    return PRESETS["cpu" if platform == "cpu" else "h100"]


def planned_run(args: Namespace) -> tuple[Run, Batch]:
    """A run as the planner knows it.

    Args:
        args: Megatron's, as resolved.

    Raises:
        ValueError: it is none that the planner knows.
    """
    for reason, applies in _not_planned(args).items():
        if applies:
            raise ValueError(reason)
    topology = Topology(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        dp=args.data_parallel_size,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        instances=args.num_distributed_optimizer_instances,
        account_for_ends=args.account_for_embedding_in_pipeline_split,
    )
    run = Run(
        shape_from_arguments(args),
        topology,
        _optimizer(args),
        args.ddp_bucket_size if args.overlap_grad_reduce else 0,
        weight_bytes=2 if args.bf16 or args.fp16 else 4,
    )
    recompute = args.recompute_granularity or "none"
    return run, Batch(args.micro_batch_size, args.global_batch_size, recompute)


def _not_planned(args: Namespace) -> dict[str, bool]:
    stages = args.pipeline_model_parallel_size
    distributed = args.use_layer_wise_distributed_optimizer or args.use_distributed_optimizer
    return {
        "virtual pipeline stages are not planned": bool(args.virtual_pipeline_model_parallel_size),
        "weights in FP8 are not planned": bool(args.fp8_param_gather),
        "an optimizer that is not distributed is not planned": not distributed,
        "experts with a tensor-parallel size of their own are not planned": bool(args.num_experts)
        and args.expert_tensor_parallel_size != args.tensor_model_parallel_size,
        "a pipeline of uneven stages is not planned": stages > 1
        and args.account_for_embedding_in_pipeline_split != args.account_for_loss_in_pipeline_split,
    }


def _optimizer(args: Namespace) -> Optimizer:
    if args.optimizer == "dion":
        config = dion_config_from_args(args)
        return Optimizer("dion", config, compressed_sync=args.dion_compressed_sync)
    if args.optimizer == "adam":
        return Optimizer("adamw")
    if args.optimizer == "muon" and args.use_layer_wise_distributed_optimizer:
        layout = args.use_layer_wise_param_layout
        return Optimizer("muon", muon_tp_mode=args.muon_tp_mode, layer_wise_layout=layout)
    raise ValueError(f"--optimizer {args.optimizer} is not planned")


def _check_matrices(run: RunFolder, planned: Run) -> None:
    """Raises ValueError where the run had other matrices than the planner thinks."""
    if not run.routes:
        return
    actual = Counter((r.matrix, r.size, r.rank) for r in run.routes if r.matrix)
    shape, config = planned.shape, planned.optimizer.dion
    thought: Counter[tuple[str, tuple[int, ...], int]] = Counter(
        (matrix.name, (matrix.rows, matrix.columns), matrix.rank)
        for parameter in shape.stage(range(shape.layers))
        if parameter.weight is not None
        for matrix in parameter.weight.matrices(config)
    )
    if differ := (actual - thought) | (thought - actual):
        raise ValueError(f"it has other matrices than planned, such as {next(iter(differ))[0]}")


def _memory(found: Prediction) -> Html:
    rows = [
        row(kind, _bytes(figure.busiest), _bytes(figure.mean))
        for kind, figure in found.memory.items()
        if figure.busiest
    ]
    mean = sum(figure.mean for figure in found.memory.values())
    rows.append(row(element("b", "all"), _bytes(found.bytes_needed), _bytes(mean)))
    return table(("", "most", "mean"), rows)


def _collectives(found: Prediction) -> Html:
    rows = [
        row(name, sent.when, _bytes(sent.sent.busiest), _bytes(sent.sent.mean), str(sent.calls))
        for name, sent in found.collectives.items()
    ]
    if not rows:
        return element("p", "Nothing: it has no other rank to send to.", class_="none")
    return table(("collective", "when", "most", "mean", "calls"), rows)


def _counted(run: RunFolder, found: Prediction) -> Iterator[Html]:
    """What the run itself says that its Dion steps send, all ranks together."""
    if found.run.optimizer.kind != "dion" or not run.training:
        return
    counted = run.training[-1]["optimizer_bytes"]
    world = found.run.topology.world
    planned = sum(
        world * sent.sent.mean
        for name, sent in found.collectives.items()
        if name.startswith("dion ") and name not in _NOT_COUNTED
    )
    yield element(
        "p",
        f"Dion’s step sends {_bytes(planned)} over all {world} ranks as planned,"
        f" {_bytes(counted)} as the run has counted.",
    )


def _loads(stage: Stage) -> Iterator[Html]:
    """How evenly the work of Dion's step is spread over the ranks of a stage."""
    for part in stage.dion_parts:
        found = loads(part.planner)
        shown = list(found.items())[:_MOST_RANKS]
        rows = [row(f"tp {r.tensor_parallel} dp {r.data_parallel}", *_load(l)) for r, l in shown]
        every = list(found.values())
        names = ("held", "charges", "sent", "summed", "operations")
        ratios = [f"{busiest_to_mean(every, name):.2f}" for name in names]
        rows.append(row(element("b", "most / mean"), *ratios))
        yield element(
            "details",
            element("summary", _loads_heading(part.is_experts, len(found), len(shown))),
            table(("rank", "numbers", "matrices in charge", "sends", "adds", "operations"), rows),
        )


def _loads_heading(is_experts: bool, ranks: int, shown: int) -> str:
    which = "experts" if is_experts else "all but experts"
    some = f", {shown} of them shown" if shown < ranks else ""
    return f"Dion’s step on {ranks} ranks of the first pipeline stage ({which}{some})"


def _load(load: Load) -> tuple[str, ...]:
    numbers = (f"{load.summed:,}", human_count(load.operations))
    return f"{load.held:,}", str(load.charges), _bytes(load.sent), *numbers


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{float(f'{count / size:.3g}'):g} {unit}"
    return f"{count:.0f} B"
