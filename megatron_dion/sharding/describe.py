"""What `--dion-print-plan` prints."""

from megatron_dion.algorithm import orthonormalize_flops
from megatron_dion.sharding.exchange import bytes_sent
from megatron_dion.sharding.layout import Layout
from megatron_dion.sharding.plan import make_plan


def describe_plan(layout: Layout) -> str:
    """A table with what each rank of a grid holds, sends and orthonormalizes in a step."""
    lines = ["tensor  data  elements  owned P  orthonormalize GFLOP  MiB to tensor  MiB to data"]
    for rank in layout.grid.ranks():
        plan = make_plan(layout, rank)
        owned = [
            (rows.stop - rows.start, layout.matrices[rows.matrix].rank)
            for rows in plan.data_hop.sums
        ]
        sent = bytes_sent(plan)
        elements = sum(rectangle.numel for _, rectangle in plan.rectangles)
        gflop = sum(orthonormalize_flops(rows, r) for rows, r in owned) / 1e9
        lines.append(
            f"{rank.tensor_parallel:6d}  {rank.data_parallel:4d}  {elements:8d}  {len(owned):7d}"
            f"  {gflop:20.3g}  {sent['tensor'] / 2**20:13.3g}  {sent['data'] / 2**20:11.3g}"
        )
    return "\n".join(lines)
