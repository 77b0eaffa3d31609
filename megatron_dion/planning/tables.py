"""Predictions side by side, as text and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_dion.planning.memory import KINDS
from megatron_dion.planning.prediction import ACTIVATIONS, Prediction
from megatron_dion.planning.search import Found

_GIB, _GB = 2.0**30, 1e9
_HEADINGS = {
    "weights": "weights",
    "gradients": "grads",
    "masters": "masters",
    "momenta": "momenta",
    "right factors": "factors",
    "exchange": "exchange",
    "scalars": "scalars",
    ACTIVATIONS: "activ. ~",
}


def describe(predictions: Sequence[Prediction], limit: float) -> str:
    """Three tables, of memory, of bytes, and of operations and times; a line per optimizer.

    Args:
        predictions: of the same run with different optimizers.
        limit: bytes of a device's memory; what does not fit is marked.
    """
    return "\n\n".join(
        [
            "Memory of the rank with most, GiB (~ an estimate)\n" + _memory(predictions, limit),
            "Sent per step in each kind of collective by the rank that sends most, GB; network"
            " is what leaves the node (~ an estimate)\n" + _bytes(predictions),
            "Operations and times (a model, see below)\n" + _times(predictions),
        ]
    )


def _memory(predictions: Sequence[Prediction], limit: float) -> str:
    rows = [["", *_HEADINGS.values(), "total"]]
    for found in predictions:
        kinds = [found.memory[kind].busiest / _GIB for kind in (*KINDS, ACTIVATIONS)]
        total = found.bytes_needed
        fits = "" if total <= limit else " > memory"
        rows.append([found.run.optimizer.label, *map(_number, kinds), _number(total / _GIB) + fits])
    return _aligned(rows)


def _bytes(predictions: Sequence[Prediction]) -> str:
    names = dict.fromkeys(name for found in predictions for name in found.collectives)
    rows = [["", *(found.run.optimizer.label for found in predictions)]]
    for name in names:
        some = next(f.collectives[name] for f in predictions if name in f.collectives)
        row = [f"{name} ~" if some.is_estimate else name]
        for found in predictions:
            one = found.collectives.get(name)
            row.append("-" if one is None else _number(one.sent.busiest / _GB))
        rows.append(row)
    for label, when, network in (
        ("all on NVLink", None, False),
        ("all on the network", None, True),
        ("optimizer's step", "step", None),
    ):
        rows.append([label, *(_number(f.sent(when, network) / _GB) for f in predictions)])
    return _aligned(rows)


def _times(predictions: Sequence[Prediction]) -> str:
    heading = "TFLOP busiest,mean,products,factoriz.,passes,exchange,step ms,iteration s,step %"
    rows = [["", *heading.split(",")]]
    for found in predictions:
        step, operations = found.step, found.operations
        parts = (step.products, step.factorizations, step.passes, step.exchange, step.total)
        rows.append(
            [
                found.run.optimizer.label,
                _number(operations.busiest / 1e12),
                _number(operations.mean / 1e12),
                *(_number(1e3 * part) for part in parts),
                _number(found.seconds),
                f"{step.total / found.seconds:.1%}",
            ]
        )
    return _aligned(rows)


def compare(found: Mapping[tuple[int, int | None], Sequence[Prediction]], limit: float) -> str:
    """A line for each data-parallel size, bucket size and optimizer.

    Args:
        found: by data-parallel size and bucket size.
        limit: bytes of a device's memory.
    """
    heading = "DP,bucket,optimizer,memory GiB,exchange GiB,all network GB,all NVLink GB"
    heading += ",step's network GB,step's NVLink GB,step ms,iteration s"
    rows = [heading.split(",")]
    for (size, bucket), predictions in found.items():
        for one in predictions:
            fits = "" if one.bytes_needed <= limit else " >"
            rows.append(
                [
                    str(size),
                    _bucket(bucket),
                    one.run.optimizer.label,
                    _number(one.bytes_needed / _GIB) + fits,
                    _number(one.memory["exchange"].busiest / _GIB),
                    *(
                        _number(one.sent(when, network) / _GB)
                        for when in (None, "step")
                        for network in (True, False)
                    ),
                    _number(1e3 * one.step.total),
                    _number(one.seconds),
                ]
            )
    return _aligned(rows) + "\n> more than the device has"


def describe_search(found: Found) -> str:
    """The best topologies, and why others are none."""
    rows = [["TP", "PP", "CP", "EP", "DP", "bucket", "memory GiB", "step ms", "iteration s"]]
    for one in found.best:
        topology = one.run.topology
        sizes = (topology.tp, topology.pp, topology.cp, topology.ep, topology.dp)
        rows.append(
            [
                *map(str, sizes),
                _bucket(one.run.bucket_size),
                _number(one.bytes_needed / _GIB),
                _number(1e3 * one.step.total),
                _number(one.seconds),
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
