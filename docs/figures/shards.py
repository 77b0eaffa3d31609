"""Where the rows of a matrix lie on tensor-parallel and data-parallel ranks."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_dion import DionConfig
from megatron_dion.sharding.layout import Grid, Layout, Placement, Rank
from megatron_dion.sharding.matrices import Weight

ROWS, COLUMNS = 14, 16
GRID = Grid(tensor_parallel_size=2, data_parallel_size=3)
RANKS = [Rank(tensor, data) for tensor in range(2) for data in range(3)]
COLORS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#1f78b4", "#33a02c", "#ff7f00")


def draw() -> Figure:
    """The same matrix in a column-parallel and in a row-parallel layer."""
    figure = Figure(figsize=(9.5, 4.0), layout="tight")
    by_rows, by_columns = figure.subplots(1, 2)
    _plot(by_rows, Weight("column-parallel layer: tensor ranks have rows", 7, COLUMNS, 0, 2))
    _plot(by_columns, Weight("row-parallel layer: tensor ranks have columns", ROWS, 8, 1, 2))
    legend = [
        Patch(facecolor=color, label=f"tensor {rank.tensor_parallel}, data {rank.data_parallel}")
        for rank, color in zip(RANKS, COLORS, strict=True)
    ]
    figure.legend(handles=legend, loc="lower center", ncols=6, bbox_to_anchor=(0.5, -0.06))
    return figure


def _plot(axes: Axes, weight: Weight) -> None:
    holders = np.zeros((ROWS, COLUMNS), dtype=int)
    bucket = -(-weight.rows * weight.columns // GRID.data_parallel_size) * GRID.data_parallel_size
    layout = Layout([Placement(weight, 0, bucket)], GRID, DionConfig())
    for number, rank in enumerate(RANKS):
        for tile in layout.rectangles(0, rank):
            columns = slice(tile.column_start, tile.column_stop)
            holders[tile.row_start : tile.row_stop, columns] = number
            if tile.cut:
                axes.text(COLUMNS + 0.3, tile.row_start + 0.5, "cut row", va="center", fontsize=8)
    axes.pcolormesh(holders, cmap=ListedColormap(COLORS), vmin=0, vmax=5, edgecolors="white")
    axes.set(xticks=[], yticks=[], xlabel=f"{COLUMNS} inputs", ylabel=f"{ROWS} outputs")
    axes.set_title(weight.name, fontsize=10)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
