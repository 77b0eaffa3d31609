"""Rectangles of a fused weight that are stepped in one call."""

from dataclasses import replace

import pytest
import torch

from megatron_dion.optimizer.binding import _stacks
from tests.unit.dion_cases import FusedComparison


@pytest.mark.parametrize("momentum_dtype", ["fp32", "bf16"])
def test_interleaved_rows_are_one_stack(momentum_dtype: str) -> None:
    comparison = FusedComparison(periods=4, columns=6, momentum_dtype=momentum_dtype)
    comparison.run(range(1))
    [chosen] = comparison.optimizer.step_sets()
    assert len(chosen.held) == 8
    with chosen.exchange.allocated():
        for stepped, rows in zip(chosen.stepped, (2, 3), strict=True):
            block = stepped.tensors
            assert block.weight.shape == block.total.shape == (4, rows, 6)
            parts = [held for held in chosen.held if held.tensors.matrix == block.matrix]
            for name in ("weight", "momentum", "kept_right", "projection"):
                for view, part in zip(getattr(block, name), parts, strict=True):
                    single = getattr(part.tensors, name)
                    assert view.data_ptr() == single.data_ptr()
                    assert (view.shape, view.stride()) == (single.shape, single.stride())
            assert (block.total is block.momentum) == (momentum_dtype == "fp32")
            assert block.right_factor is block.kept_right


def test_totals_follow_the_gradients_memory() -> None:
    comparison = FusedComparison(momentum_dtype="bf16")
    for step in range(2):
        comparison.run([step])  # with a new gradient tensor
        [chosen] = comparison.optimizer.step_sets()
        gradient = comparison.parameter.grad
        assert gradient is not None
        first = chosen.stepped[1].tensors.total
        assert first.data_ptr() == gradient[2 * 6 :].data_ptr()


def test_unequal_distances_are_not_joined() -> None:
    comparison = FusedComparison(periods=3)
    comparison.run(range(1))
    [chosen] = comparison.optimizer.step_sets()
    blocks = [held.tensors for held in chosen.held if held.tensors.matrix == 0]
    with chosen.exchange.allocated():
        assert [len(block.weight) for block in _stacks(blocks)] == [3]
        weight = blocks[1].weight
        moved = torch.empty(100).as_strided(weight.shape, weight.stride(), 1)
        apart = [blocks[0], replace(blocks[1], weight=moved), blocks[2]]
        assert [len(block.weight) for block in _stacks(apart)] == [1, 1, 1]
