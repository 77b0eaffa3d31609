"""Where the rows of a matrix lie on tensor-parallel and data-parallel ranks."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_dion.sharding import Grid, Placement, Weight
from megatron_dion.sharding.blocks import rectangles

ROWS, COLUMNS = 14, 16
GRID = Grid(tensor_parallel_size=2, data_parallel_size=3)
COLORS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#1f78b4", "#33a02c", "#ff7f00")


def draw() -> Figure:
    """The same matrix in a column-parallel and in a row-parallel layer."""
    figure, (by_rows, by_columns) = plt.subplots(1, 2, figsize=(9.5, 4.0))
    _plot(by_rows, _weight(0), "column-parallel layer: tensor ranks have rows")
    _plot(by_columns, _weight(1), "row-parallel layer: tensor ranks have columns")
    legend = [
        Patch(facecolor=color, label=f"tensor {index // 3}, data {index % 3}")
        for index, color in enumerate(COLORS)
    ]
    figure.legend(handles=legend, loc="lower center", ncols=6, bbox_to_anchor=(0.5, -0.06))
    figure.tight_layout()
    return figure


def _weight(partition_dim: int) -> Weight:
    sizes = [ROWS, COLUMNS]
    sizes[partition_dim] //= GRID.tensor_parallel_size
    return Weight("weight", *sizes, partition_dim, GRID.tensor_parallel_size)


def _plot(axes: Axes, weight: Weight, title: str) -> None:
    owners = np.zeros((ROWS, COLUMNS), dtype=int)
    cut_rows = set()
    bucket = -(-weight.rows * weight.columns // GRID.data_parallel_size) * GRID.data_parallel_size
    placement = Placement(weight, 0, bucket)
    for rank in GRID.ranks():
        piece = placement.piece(rank.data_parallel, GRID.data_parallel_size)
        owner = rank.tensor_parallel * GRID.data_parallel_size + rank.data_parallel
        for block in rectangles(weight, rank.tensor_parallel, *piece):
            rows = slice(block.row_start, block.row_stop)
            owners[rows, block.column_start : block.column_stop] = owner
            if block.cut:
                cut_rows.add(block.row_start)
    axes.pcolormesh(owners, cmap=ListedColormap(COLORS), vmin=0, vmax=5, edgecolors="white")
    for row in sorted(cut_rows):
        axes.text(COLUMNS + 0.3, row + 0.5, "cut row", va="center", fontsize=8)
    axes.set(xticks=[], yticks=[], xlabel=f"{COLUMNS} inputs", ylabel=f"{ROWS} outputs")
    axes.set_title(title, fontsize=10)
    axes.invert_yaxis()
    for spine in axes.spines.values():
        spine.set_visible(False)
