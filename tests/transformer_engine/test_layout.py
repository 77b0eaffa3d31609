"""Transformer Engine's FP8 tensors are routed and laid out as bf16 weights are."""

from typing import Any

import pytest

from tests.worlds import world

CLASSES = {
    "delayed": "Float8Tensor",
    "tensorwise": "Float8Tensor",
    "blockwise": "Float8BlockwiseQTensor",
    "mxfp8": "MXFP8Tensor",
}


def layout(recipe: str, sizes_of: str) -> dict[str, Any]:
    """On a rank: the weights' classes, the buffers, and what this rank holds of the matrices."""
    from megatron_dion.optimizer.routing import weight_of
    from tests.distributed.recording import rectangles_of
    from tests.transformer_engine.model import Training

    training = Training(recipe, sizes_of)
    dion = training.optimizer.chained_optimizers[0]
    return {
        "classes": [type(weight).__name__ for weight in training.weights],
        "tagged": [weight_of(weight) is not None for weight in training.weights],
        "buffers": [
            (
                str(buffer.param_dtype),
                {weight_of(parameter) is not None for parameter in buffer.params},
            )
            for buffer in training.chunk.buffers
        ],
        "rectangles": [
            (matrix.name, rectangle) for matrix, _, rectangle in rectangles_of(dion.optimizer)
        ],
    }


@pytest.mark.parametrize("recipe", CLASSES)
def test_layout_is_that_of_bf16(recipe: str) -> None:
    found = world(4).fork_in_group(layout, recipe, recipe)
    in_bf16 = world(4).fork_in_group(layout, "bf16", recipe)
    assert [rank["rectangles"] for rank in found] == [rank["rectangles"] for rank in in_bf16]
    for rank in found:
        assert rank["classes"] == [CLASSES[recipe]] * 3
        # Megatron has called bfloat16() on the model in between.
        assert rank["tagged"] == [True] * 3
        assert sorted(rank["buffers"]) == [("torch.bfloat16", {False}), ("torch.uint8", {True})]
