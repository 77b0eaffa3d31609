"""Buffers of the exchange: as many bytes as planned, while a step needs them, and none after it."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dion import DionConfig
from megatron_dion.algorithm import step
from megatron_dion.optimizer import dion
from megatron_dion.sharding import Grid, Planner, sets_within
from megatron_dion.sharding.memory import buffer_bytes, peak
from megatron_dion_tools.local.world import gloo_world
from megatron_dion_tools.plan.stage import DionPart
from megatron_dion_tools.plan.topology import Topology
from megatron_dion_tools.plan.traffic import calls_of, set_bytes
from tests.distributed.test_sharded_dion import (
    ALONE,
    ODD,
    TRANSFORMER,
    WORLDS,
    Shape,
    Shards,
    World,
    compare,
    counted_bytes,
    name_of,
    nothing,
    place,
    reference,
    run,
    train_shards,
    values,
)


class Watched(TorchDispatchMode):
    """The memory of resized storages, and the largest tensor that any operation makes.

    Attributes:
        live: bytes of each resized storage.
        peak: the most that they had together.
        largest: numbers of the largest tensor that was not there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0
        self.largest = 0

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        _RESIZE(storage, nbytes)
        self.live[storage._cdata] = nbytes
        self.peak = max(self.peak, sum(self.live.values()))
        self.largest = max(self.largest, nbytes // 4)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before | self.live.keys():
                    self.largest = max(self.largest, storage.nbytes() // tensor.itemsize)
        return result


_RESIZE = torch.UntypedStorage.resize_


@contextmanager
def watched() -> Iterator[Watched]:
    watch = Watched()

    def resize(storage: torch.UntypedStorage, nbytes: int) -> None:
        watch.resize(storage, nbytes)

    with mock.patch.object(torch.UntypedStorage, "resize_", resize), watch:
        yield watch


@dataclass
class Seen:
    """What a rank saw of a step.

    Attributes:
        kinds: planned bytes by kind, for each set.
        peak: the most that buffers had at a time.
        left: bytes of buffers after the step.
        largest: numbers of the largest tensor that was made.
    """

    kinds: list[dict[str, int]]
    peak: int
    left: int
    largest: int


def one_step(
    world: World,
    shapes: tuple[Shape, ...],
    config: DionConfig,
    bucket: int,
    gradients: Any = values,
    in_flight: int = 1,
) -> Seen:
    shards = Shards(world, shapes, config, bucket)
    shards.set_gradients(gradients(shapes, 1), 1)
    sets = shards.optimizer.step_sets()
    with mock.patch.object(step, "IN_FLIGHT", in_flight), watched() as watch:
        shards.optimizer.step()
    return Seen(
        kinds=[buffer_bytes(chosen.plan, chosen.replicas) for chosen in sets],
        peak=watch.peak,
        left=sum(watch.live.values()),
        largest=watch.largest,
    )


CONFIGS = {
    "fp32": {},
    "orth": {"right_factor": "orth"},
    "cqr": {"orthonormalizer": "cqr", "comm_dtype": "bf16"},
    "bf16": {"comm_dtype": "bf16", "factor_dtype": "bf16", "momentum_dtype": "bf16"},
}


@pytest.mark.parametrize("world", [*WORLDS, World(1, 2, 2), World(2, 2, 2)], ids=name_of)
@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("shapes", [TRANSFORMER, ODD, ALONE], ids=["transformer", "odd", "alone"])
def test_buffers_are_as_planned(world: World, options: str, shapes: tuple[Shape, ...]) -> None:
    """A set at a time, to the byte; afterwards nothing is left."""
    config = DionConfig(rank_fraction=0.3, **CONFIGS[options])
    for seen in gloo_world(world.size, one_step, world, shapes, config, 5000):
        assert seen.peak == max(peak({**kinds, "fallback": 0}) for kinds in seen.kinds)
        assert seen.left == 0


@pytest.mark.parametrize("world", [World(2, 1), World(2, 2), World(1, 4)], ids=name_of)
def test_buffers_of_a_fallback_are_as_planned(world: World) -> None:
    config = DionConfig(rank_fraction=0.3)
    results = gloo_world(world.size, one_step, world, ALONE, config, 10**9, nothing)
    assert sum(any(kinds["fallback"] for kinds in seen.kinds) for seen in results) > 1
    for seen in results:
        assert seen.peak == max(peak(kinds) for kinds in seen.kinds)


MANY = tuple(
    replace(shape, name=f"{layer}.{shape.name}") for layer in range(3) for shape in TRANSFORMER
)


def needed(world: World, shapes: tuple[Shape, ...], config: DionConfig, bucket: int) -> float:
    """The least limit, in MiB."""
    try:
        sets_within(planner_of(world, shapes, config, bucket), range(len(shapes)), world.size, 1e-9)
    except ValueError as error:
        return float(str(error).rpartition(" ")[2])
    raise AssertionError("such a small limit is refused")


def planner_of(world: World, shapes: tuple[Shape, ...], config: DionConfig, bucket: int) -> Planner:
    return Planner(place(shapes, world.tp, world.dp, bucket), Grid(world.tp, world.dp), config)


SHARDED = [World(2, 2), World(1, 4), World(2, 1), World(1, 2)]


@pytest.mark.parametrize("world", SHARDED, ids=name_of)
@pytest.mark.parametrize("options", CONFIGS)
def test_two_sets_in_flight_stay_below_the_limit(world: World, options: str) -> None:
    config = DionConfig(rank_fraction=0.2, **CONFIGS[options])
    limit = needed(world, MANY, config, 5000)
    config = replace(config, exchange_buffer_mib=limit)
    for seen in gloo_world(world.size, one_step, world, MANY, config, 5000, values, 2):
        peaks = [peak(kinds) for kinds in seen.kinds]
        assert len(peaks) > 2
        assert max(peaks) < seen.peak <= limit * 2**20
        assert seen.left == 0


@pytest.mark.parametrize("world", SHARDED, ids=name_of)
@pytest.mark.parametrize("fraction", [0.1, 0.5])
@pytest.mark.parametrize("gradients", [values, nothing], ids=["divided", "fallback"])
@pytest.mark.parametrize("orthonormalizer", ["auto", "rcqr"])
def test_no_tensor_is_as_large_as_a_sharded_matrix(
    world: World, fraction: float, gradients: Any, orthonormalizer: str
) -> None:
    """Neither a buffer, where it holds one matrix, nor what any operation of the step makes."""
    config = DionConfig(rank_fraction=fraction, orthonormalizer=orthonormalizer)
    shapes = (Shape("column", 200, 96, 0), Shape("row", 96, 200, 1))
    for seen in gloo_world(world.size, one_step, world, shapes, config, 10**9, gradients):
        assert any(kinds["parts"] for kinds in seen.kinds) == (world != World(1, 2))
        assert 0 < seen.largest < 200 * 96


@pytest.mark.parametrize("world", [World(2, 1), World(1, 2)], ids=name_of)
@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
def test_number_of_sets_does_not_change_bits(world: World, right_factor: str) -> None:
    """Two ranks add up in one order, however the sums are packed."""
    config = DionConfig(rank_fraction=0.2, right_factor=right_factor)
    least = needed(world, MANY, config, 5000)
    found = {}
    for limit in (None, least, 1.3 * least):
        limited = replace(config, exchange_buffer_mib=limit)
        results = gloo_world(world.size, train_shards, world, MANY, limited, 5000)
        assert all(result.sent == result.planned for result in results)
        for result in results:
            for name, place_, *tensors, columns in result.blocks:
                key = (result.rank, name, place_, columns.start)
                before = found.setdefault(key, tensors)
                assert all(map(torch.equal, before, tensors)), (limit, name)


@pytest.mark.parametrize("world", SHARDED[:2], ids=name_of)
def test_many_sets_equal_the_reference(world: World) -> None:
    config = DionConfig(rank_fraction=0.3)
    limited = replace(config, exchange_buffer_mib=needed(world, MANY, config, 5000))
    results = run(world, MANY, limited, 5000)
    compare(results, reference(MANY, config), tolerance=1e-5)


@dataclass
class Calls:
    """Of a step: collectives, those planned, its sets, and of them those with something."""

    made: int
    planned: int
    sets: int
    partial_rows: int
    cut_matrices: int
    cut_rows: int
    merged: int
    unmerged: int


def planned_calls(world: World, planner: Planner, replicas: tuple[int, ...]) -> int:
    group = Topology(tp=world.tp, dp=world.dp).data()
    part = DionPart(planner, is_experts=False, group=group, replicas=replicas)
    calls = sum(
        calls_of(part, index, kind, sent)
        for index in range(len(planner.sets))
        for kind, (sent, _) in set_bytes(part, index).items()
    )
    # The gradients of those that do not average P and R.
    return calls + (world.replicas > 1 and 1 in replicas)


def count_calls(world: World, shapes: tuple[Shape, ...], config: DionConfig) -> Calls:
    shards = Shards(world, shapes, config, 5000)
    shards.set_gradients(values(shapes, 1), 1)
    with counted_bytes() as sent:
        shards.optimizer.step()
    sets = shards.optimizer.step_sets()
    plans = [chosen.plan for chosen in sets]
    replicas = tuple(chosen.replicas for chosen in sets)
    holders = plans[0].layout.columns_of_holders

    def is_cut(matrix: int) -> bool:
        return len({rank.data_parallel for rank in holders[matrix]}) > 1

    return Calls(
        made=sent.calls,
        planned=planned_calls(world, shards.optimizer.planner(), replicas),
        sets=len(plans),
        partial_rows=sum(plan.has_partial_rows for plan in plans),
        cut_matrices=sum(any(map(is_cut, plan.members)) for plan in plans),
        cut_rows=sum(plan.has_shared_rows for plan in plans),
        merged=sum(bool(plan.merged) for plan in plans),
        unmerged=sum(len(plan.merged) < len(plan.members) for plan in plans),
    )


# As docs/design.md has it: of a set whose P are each orthonormalized by one rank.
@pytest.mark.parametrize("world", [World(2, 2), World(2, 1), World(1, 2)], ids=name_of)
def test_collectives_are_those_of_a_set_times_the_sets(world: World) -> None:
    config = DionConfig(rank_fraction=0.2, orthonormalizer="qr")
    least = needed(world, MANY, config, 5000)
    seen = set()
    for limit in (None, 1.3 * least, least):
        limited = replace(config, exchange_buffer_mib=limit)
        results = gloo_world(world.size, count_calls, world, MANY, limited)
        for found in results:
            of_cuts = 4 * found.cut_matrices + found.cut_rows
            of_norms = 2 * found.sets if world.tp > 1 else 0
            of_left = 2 * (found.unmerged + found.merged) if world.tp > 1 else 0
            of_rows = 2 * found.partial_rows
            assert found.made == found.planned == of_cuts + of_norms + of_left + of_rows
            assert found.merged or world.tp == 1
            assert found.cut_rows or world.dp == 1
            seen.add(found.sets)
    assert len(seen) == 3


@pytest.mark.parametrize("world", [World(2, 1, 2), World(1, 2, 2)], ids=name_of)
def test_collectives_of_replicas_are_planned(world: World) -> None:
    config = DionConfig(rank_fraction=0.2, orthonormalizer="qr")
    for found in gloo_world(world.size, count_calls, world, MANY, config):
        assert found.made == found.planned
        assert found.partial_rows or world.tp == 1


def count_turns(world: World, config: DionConfig) -> tuple[list[int], list[bool]]:
    """Of each set: how often its step lets another one compute, and whether nobody sends."""
    shards = Shards(world, MANY, config, 5000)
    shards.set_gradients(values(MANY, 1), 1)
    turns = []

    def one_by_one(steps: Iterable[Generator[None, None, int]]) -> int:
        turns.extend(sum(1 for _ in step) for step in steps)
        return 0

    with mock.patch.object(dion, "interleave", one_by_one):
        shards.optimizer.step()
    plans = [chosen.plan for chosen in shards.optimizer.step_sets()]
    return turns, [plan.left.data_hop.is_silent for plan in plans]


def test_sets_take_turns_also_where_one_has_nothing_to_send() -> None:
    """Else the other's calls would have nothing beside them."""
    world, config = World(1, 2), DionConfig(rank_fraction=0.2, orthonormalizer="qr")
    limited = replace(config, exchange_buffer_mib=needed(world, MANY, config, 5000))
    for turns, silent in gloo_world(world.size, count_turns, world, limited):
        assert True in silent
        assert False in silent
        # P there and back, cut rows of R, norms there and back.
        assert set(turns) == {5}


STATE_SHAPES = [(64, 64), (32, 96), (96, 32), (48, 40)]


def state_and_elements(world: World) -> list[tuple[int, int]]:
    """For some shapes and ranks: bytes of state on this rank, elements that it holds."""
    found = []
    for shape, fraction, multiple in product(STATE_SHAPES, (1 / 2, 1 / 4, 1 / 16), (1, 8)):
        shapes = tuple(Shape(f"{dim}", *shape, dim) for dim in (0, 1))
        config = DionConfig(rank_fraction=fraction, rank_multiple_of=multiple)
        optimizer = Shards(world, shapes, config, 10**9).optimizer
        optimizer.init_state()
        tensors = [t for state in optimizer.state.values() for t in state.values()]
        elements = sum(parameter.numel() for parameter in optimizer.state)
        found.append((sum(tensor.nbytes for tensor in tensors), elements))
    return found


@pytest.mark.parametrize("world", [World(1, 1), *SHARDED], ids=name_of)
def test_state_is_smaller_than_that_of_adamw(world: World) -> None:
    """At rank fractions up to 1/2; AdamW keeps eight bytes a number beside the master."""
    for found in gloo_world(world.size, state_and_elements, world):
        for nbytes, elements in found:
            assert nbytes < 8 * elements
