"""Predictions side by side, as text and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_dion_tools.plan.prediction import ACTIVATIONS, Prediction
from megatron_dion_tools.plan.search import Found

BINARY = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
DECIMAL = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
_OPERATIONS = {"MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12}
STEP = {"us": 1e-6, "ms": 1e-3}
_ITERATION = {**STEP, "s": 1.0}
_PARAMETERS = {"K": 1e3, "M": 1e6, "B": 1e9}
_HEADINGS = {
    "weights": "weights",
    "gradients": "grads",
    "masters": "masters",
    "momenta": "momenta",
    "right factors": "factors",
    "exchange": "exchange",
    "scalars": "scalars",
    "bf16 copies": "copies",
    ACTIVATIONS: "activ. ~",
}


def describe(predictions: Sequence[Prediction], limit: float) -> str:
    """Three tables, of memory, of bytes, and of operations and times; a line per optimizer.

    Args:
        predictions: of the same run with different optimizers.
        limit: bytes of a device's memory; what does not fit is marked.
    """
    return "\n\n".join([_memory(predictions, limit), _bytes(predictions), _times(predictions)])


def parameters(count: int) -> str:
    """A number of parameters in words."""
    unit, size = fitting_unit(_PARAMETERS, [count])
    return f"{count / size:.2f} {unit} parameters"


def fitting_unit(units: Mapping[str, float], values: Iterable[float]) -> tuple[str, float]:
    """The unit that fits the largest value, and its size."""
    largest = max(map(abs, values), default=0)
    return max(
        (found for found in units.items() if found[1] <= largest),
        key=lambda found: found[1],
        default=min(units.items(), key=lambda found: found[1]),
    )


def _memory(predictions: Sequence[Prediction], limit: float) -> str:
    """A column for each kind that any has."""
    kinds = [kind for kind in _HEADINGS if any(found.memory[kind].busiest for found in predictions)]
    unit, size = fitting_unit(BINARY, (found.bytes_needed for found in predictions))
    rows = [["", *(_HEADINGS[kind] for kind in kinds), "total"]]
    for found in predictions:
        total = found.bytes_needed
        figures = [*(found.memory[kind].busiest for kind in kinds), total]
        row = [found.run.optimizer.label, *(_number(figure / size) for figure in figures)]
        row[-1] += "" if total <= limit else " > memory"
        rows.append(row)
    return f"Memory of the rank with most, {unit} (~ an estimate)\n{_aligned(rows)}"


def _bytes(predictions: Sequence[Prediction]) -> str:
    unit, size = fitting_unit(DECIMAL, (found.sent() for found in predictions))
    names = dict.fromkeys(name for found in predictions for name in found.collectives)
    rows = [["", *(found.run.optimizer.label for found in predictions)]]
    for name in names:
        some = next(f.collectives[name] for f in predictions if name in f.collectives)
        row = [f"{name} ~" if some.is_estimate else name]
        for found in predictions:
            one = found.collectives.get(name)
            row.append("-" if one is None else _number(one.sent.busiest / size))
        rows.append(row)
    for label, when, network in (
        ("all on NVLink", None, False),
        ("all on the network", None, True),
        ("optimizer's step", "step", None),
    ):
        rows.append([label, *(_number(f.sent(when, network) / size) for f in predictions)])
    return (
        f"Sent per step in each kind of collective by the rank that sends most, {unit}; network"
        f" is what leaves the node (~ an estimate)\n{_aligned(rows)}"
    )


def _times(predictions: Sequence[Prediction]) -> str:
    count, operation = fitting_unit(
        _OPERATIONS, (found.operations.busiest for found in predictions)
    )
    step_unit, short = fitting_unit(STEP, (found.step.total for found in predictions))
    unit, long = fitting_unit(_ITERATION, (found.seconds for found in predictions))
    heading = f"{count} busiest,mean,products,factoriz.,passes,exchange"
    heading += f",step {step_unit},iteration {unit},step %"
    rows = [["", *heading.split(",")]]
    for found in predictions:
        step, operations = found.step, found.operations
        parts = (step.products, step.factorizations, step.passes, step.exchange, step.total)
        rows.append(
            [
                found.run.optimizer.label,
                _number(operations.busiest / operation),
                _number(operations.mean / operation),
                *(_number(part / short) for part in parts),
                _number(found.seconds / long),
                f"{step.total / found.seconds:.1%}",
            ]
        )
    return f"Operations and times (a model, see below)\n{_aligned(rows)}"


def compare(found: Mapping[tuple[int, int | None], Sequence[Prediction]], limit: float) -> str:
    """A line for each data-parallel size, bucket size and optimizer.

    Args:
        found: by data-parallel size and bucket size.
        limit: bytes of a device's memory.
    """
    every = [one for predictions in found.values() for one in predictions]
    kept, kept_size = fitting_unit(BINARY, (one.bytes_needed for one in every))
    sent, sent_size = fitting_unit(DECIMAL, (one.sent() for one in every))
    step, short = fitting_unit(STEP, (one.step.total for one in every))
    iteration, long = fitting_unit(_ITERATION, (one.seconds for one in every))
    heading = f"DP,bucket,optimizer,memory {kept},exchange {kept},all network {sent}"
    heading += f",all NVLink {sent},step's network {sent},step's NVLink {sent}"
    heading += f",step {step},iteration {iteration}"
    rows = [heading.split(",")]
    for (size, bucket), predictions in found.items():
        for one in predictions:
            fits = "" if one.bytes_needed <= limit else " >"
            rows.append(
                [
                    str(size),
                    _bucket(bucket),
                    one.run.optimizer.label,
                    _number(one.bytes_needed / kept_size) + fits,
                    _number(one.memory["exchange"].busiest / kept_size),
                    *(
                        _number(one.sent(when, network) / sent_size)
                        for when in (None, "step")
                        for network in (True, False)
                    ),
                    _number(one.step.total / short),
                    _number(one.seconds / long),
                ]
            )
    return _aligned(rows) + "\n> more than the device has"


def describe_search(found: Found) -> str:
    """The best topologies, and why others are none."""
    kept, kept_size = fitting_unit(BINARY, (one.bytes_needed for one in found.best))
    step, short = fitting_unit(STEP, (one.step.total for one in found.best))
    iteration, long = fitting_unit(_ITERATION, (one.seconds for one in found.best))
    heading = f"TP,PP,CP,EP,DP,bucket,memory {kept},step {step},iteration {iteration}"
    rows = [heading.split(",")]
    for one in found.best:
        topology = one.run.topology
        sizes = (topology.tp, topology.pp, topology.cp, topology.ep, topology.dp)
        rows.append(
            [
                *map(str, sizes),
                _bucket(one.run.bucket_size),
                _number(one.bytes_needed / kept_size),
                _number(one.step.total / short),
                _number(one.seconds / long),
            ]
        )
    lines = [f"{count:>6} {reason}" for reason, count in found.failures.most_common()]
    return "\n".join(
        [
            _aligned(rows),
            f"{found.slower} more fit and are slower. Others fail, for example:",
            *lines,
        ]
    )


def _bucket(size: int | None) -> str:
    return "default" if size is None else "one" if size == 0 else f"{size:,}"


def as_json(predictions: Iterable[Prediction]) -> list[dict[str, Any]]:
    """All figures, in bytes, operations and seconds."""
    return [
        {
            "optimizer": found.run.optimizer.label,
            "topology": asdict(found.run.topology),
            "bucket_size": found.run.bucket_size,
            "memory": {kind: asdict(figure) for kind, figure in found.memory.items()},
            "collectives": {name: asdict(sent) for name, sent in found.collectives.items()},
            "operations": asdict(found.operations),
            "model_operations": asdict(found.model_operations),
            "step_seconds": {**asdict(found.step), "total": found.step.total},
            "iteration_seconds": found.seconds,
        }
        for found in predictions
    ]


def _number(value: float) -> str:
    """Three digits or so."""
    if value == 0:
        return "0"
    if value < 0.005:
        return f"{value:.0e}"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
