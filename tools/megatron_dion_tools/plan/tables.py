"""Predictions side by side."""

from collections.abc import Sequence

from megatron_dion_tools.plan.prediction import Prediction

_UNITS = {
    "B": {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "sent": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9},
    "FLOP": {"MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12},
    "s": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
    "parameters": {"K parameters": 1e3, "M parameters": 1e6, "B parameters": 1e9},
}


def quantity(value: float, kind: str) -> str:
    """A number with three digits and the unit of a kind, a key of `_UNITS`, that fits it."""
    if value == 0:
        return "-"
    units = sorted(_UNITS[kind].items(), key=lambda unit: unit[1])
    name, size = next((unit for unit in reversed(units) if unit[1] <= value), units[0])
    number = value / size
    return f"{number:.0f} {name}" if number >= 100 else f"{number:.3g} {name}"


def overview(predictions: Sequence[Prediction], limit: float) -> str:
    """A line for each prediction; what needs more than a limit of memory is marked."""
    rows = []
    names = ("tp", "pp", "cp", "dp", "instances")
    sizes = [s for s in names if any(getattr(p.run.topology, s) > 1 for p in predictions)]
    for one in predictions:
        size = one.run.bucket_size
        rows.append(
            {
                **{name.upper(): str(getattr(one.run.topology, name)) for name in sizes},
                "bucket": "default" if size is None else f"{size:,}" if size else "one",
                "optimizer": one.run.optimizer.label,
                "memory": quantity(one.bytes_needed, "B") + " >" * (one.bytes_needed > limit),
                "network": quantity(one.sent(True), "sent"),
                "node": quantity(one.sent(False), "sent"),
                "step's network": quantity(one.sent(True, "step"), "sent"),
                "step's node": quantity(one.sent(False, "step"), "sent"),
                "operations": quantity(one.operations, "FLOP"),
                "launches": f"{one.launches:.0f}",
                **{part: quantity(seconds, "s") for part, seconds in one.step.items()},
                "step": quantity(one.step_seconds, "s"),
                "iteration": quantity(one.seconds, "s"),
            }
        )
    return _aligned(rows) + "\n> more than the device has"


def details(predictions: Sequence[Prediction]) -> str:
    """Memory by kind and bytes by collective; a column for each optimizer."""
    memory = {p.run.optimizer.label: p.memory for p in predictions}
    sent = {
        p.run.optimizer.label: {f"{c.name} ({c.group.link})": c.bytes for c in p.collectives}
        for p in predictions
    }
    return (
        f"Memory of the rank that needs most (~ an estimate)\n{_columns(memory, 'B')}\n\n"
        f"Sent in a step by the rank that sends most (~ an estimate)\n{_columns(sent, 'sent')}"
    )


def _columns(values: dict[str, dict[str, float]], kind: str) -> str:
    rows = []
    for name in dict.fromkeys(name for column in values.values() for name in column):
        cells = {label: quantity(column.get(name, 0), kind) for label, column in values.items()}
        rows.append({"": name, **cells})
    return _aligned(rows)


def _aligned(rows: Sequence[dict[str, str]]) -> str:
    """Rows, which have the same columns, as lines below the names of the columns."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
