"""What is planned of an optimizer's part in a step, against counts and against all plans."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_dion import DionConfig
from megatron_dion.algorithm.orthonormalize import orthonormalize_flops
from megatron_dion.sharding.collectives import Groups
from megatron_dion.sharding.exchange import ShardedExchange
from megatron_dion.sharding.layout import Grid, Layout
from megatron_dion.sharding.plan import make_plan, sets_of
from megatron_dion_tools.plan import GptShape, place
from megatron_dion_tools.plan.dion import busiest_ranks, dion
from megatron_dion_tools.plan.stage import Optimizer, Run, Stage
from megatron_dion_tools.plan.topology import Topology
from megatron_dion_tools.plan.updates import muon, newton_schulz

SHAPE = GptShape(6, 512, 1376, 8, 4, vocab=1000, sequence=256)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muons_iterations(shape: tuple[int, int]) -> None:
    utils = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    with FlopCounterMode(display=False) as counter:
        utils.newton_schulz(torch.randn(shape), steps=5)
    assert counter.get_total_flops() == newton_schulz(*shape)


def test_muon_on_more_ranks_than_weights_does_a_whole_one() -> None:
    run = Run(SHAPE, Topology(tp=2, dp=64), Optimizer("muon"), global_batch=64)
    stage = Stage(run, 0)
    found = muon(stage)
    assert found.elements == 2 * 1376 * 512 // 2
    assert found.products == newton_schulz(1376, 512)  # gate and up of a tensor-parallel rank
    duplicated = Run(
        SHAPE, run.topology, Optimizer("muon", muon_tp_mode="duplicated"), global_batch=64
    )
    gathering = muon(Stage(duplicated, 0))
    assert gathering.products == newton_schulz(2752, 512)
    assert gathering.collectives[0].bytes == 4 * found.elements


@pytest.mark.parametrize(
    ("topology", "bucket_size"),
    [
        (Topology(tp=2, dp=4), 0),
        (Topology(tp=4, dp=24), 300_000),
        (Topology(dp=64), 0),
        (Topology(dp=48), 1_000_000),
    ],
)
@pytest.mark.parametrize("residual", ["none", "rows"])
def test_the_busiest_ranks_are_among_those_planned(
    topology: Topology, bucket_size: int, residual: Any
) -> None:
    """What is planned is what the plans of all ranks say, but for a per cent."""
    config = DionConfig(rank_fraction=0.25, comm_dtype="bf16", residual=residual)
    run = Run(SHAPE, topology, Optimizer("dion", config), bucket_size, global_batch=192)
    stage = Stage(run, 0)
    update = dion(stage)
    placements = place(stage.weights, topology.dp, stage.bucket_size)
    layout = Layout(placements, Grid(topology.tp, topology.dp), config)
    sets = sets_of(layout, range(len(placements)), layout.grid.size)
    most: Counter[str] = Counter()
    for rank in layout.grid.ranks():
        plans = [make_plan(layout, rank, each) for each in sets]
        sent = Counter(operations=0)
        for plan in plans:
            exchange = ShardedExchange(plan, Groups(), torch.device("meta"))
            sent.update(exchange.bytes_sent())
            for tile in plan.owner_hop.sums:
                r = layout.matrices[tile.matrix].rank
                sent["operations"] += orthonormalize_flops(tile.stop - tile.start, r)
        most |= sent
    assert len(busiest_ranks(layout)) <= 16
    planned = {one.group.link: one.bytes for one in update.collectives}
    planned["operations"] = update.float32_products + update.factorizations
    for name in ("tensor", "data", "replicas", "operations"):
        # Products and factorizations have their maxima on different ranks.
        assert 0.99 * most[name] <= planned[name] <= 1.05 * most[name], name
    assert update.memory["momenta"] == 4 * stage.matrices / topology.dp
    # Of a plan with all weights in it, on all ranks together.
    products = 8 if residual == "none" else 6
    total = sum(products * m.rows * m.columns * m.rank for m in layout.matrices)
    assert 1 <= update.products * layout.grid.size / total < 2.5


def test_compressed_sync_averages_what_is_smaller() -> None:
    """P and R over instances, and gradients of weights whose P and R are no smaller."""
    topology = Topology(dp=4, instances=2)
    sent = {}
    for fraction in (1 / 16, 1.0):
        optimizer = Optimizer("dion", DionConfig(rank_fraction=fraction), compressed_sync=True)
        stage = Stage(Run(SHAPE, topology, optimizer, 0, global_batch=4), 0)
        update = dion(stage)
        sent[fraction] = {one.group.link: one.bytes for one in update.collectives}["replicas"]
    assert sent[1.0] == 4 * stage.matrices / 2  # an all-reduce over two
    assert 0 < sent[1 / 16] < sent[1.0] / 4
