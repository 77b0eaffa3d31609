"""How much a step says to other ranks: calls that do not grow with the model, bytes as planned."""

from collections import Counter
from typing import Any

import torch.distributed as dist

from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, train

COLLECTIVES = (
    "all_reduce",
    "all_to_all_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_object",
    "broadcast",
    "barrier",
    "batch_isend_irecv",
)
TP2_DP2 = "--tensor-model-parallel-size 2 --sequence-parallel --train-iters 8".split()


def count_calls(layers: int) -> Counter[str]:
    """On a rank: the collectives that the last optimizer step of a run called."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    calls: Counter[str] = Counter()
    for name in COLLECTIVES:
        setattr(dist, name, counting(name, getattr(dist, name), calls))
    step = ChainedOptimizer.step

    def counted(self: ChainedOptimizer) -> Any:
        calls.clear()
        result = step(self)
        counted.calls = Counter(calls)
        return result

    ChainedOptimizer.step = counted
    train([*MODEL, *TRAINING, *DION, *TP2_DP2, "--num-layers", str(layers)])
    return counted.calls


def counting(name: str, function: Any, calls: Counter[str]) -> Any:
    def counted(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*args, **options)

    return counted


def test_number_of_collectives_does_not_grow_with_layers(nursery: Nursery) -> None:
    one, few, many = (nursery.run(4, count_calls, layers) for layers in (1, 4, 6))
    # Two sets of matrices, each: columns of Q over TP; P, Gram matrices of P in sections, and norms
    # over TP and back, and nothing over DP, since no matrix is cut; R over TP; and whether these
    # Gram matrices were enough, over TP and over DP, which they are from the fourth step on. One
    # all-reduce is Megatron's norm of the gradient.
    expected = {"all_gather_into_tensor": 2, "all_to_all_single": 2 * 6, "all_reduce": 2 * 3 + 1}
    assert few == many == [expected] * 4
    # With so few matrices one is cut over DP: its set has P and norms over DP and back, too.
    assert one == [expected | {"all_to_all_single": 2 * 6 + 4}] * 4
