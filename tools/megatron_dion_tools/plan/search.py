"""The fastest topologies for a number of ranks under a memory limit, by the model of times."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dion_tools.plan.divisors import divisors
from megatron_dion_tools.plan.hardware import Hardware
from megatron_dion_tools.plan.models import GptShape
from megatron_dion_tools.plan.prediction import Prediction, predict
from megatron_dion_tools.plan.stage import Optimizer, Run
from megatron_dion_tools.plan.topology import Batch, Topology

_ADAMW = Optimizer("adamw")


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: the fastest that fit, the first the fastest.
        failures: why others cannot run, with one of them, and how many fail so.
        slower: how many fit but are slower, by a bound or exactly.
    """

    best: list[Prediction]
    failures: Counter[str]
    slower: int


def search(
    shape: GptShape,
    ranks: int,
    batch: Batch,
    optimizer: Optimizer,
    machine: Hardware,
    limit: float,
    bucket_sizes: Sequence[int | None] = (None, 0),
    weight_bytes: int = 2,
    most: int = 10,
) -> Found:
    """Tries all topologies whose sizes multiply to the number of ranks.

    An iteration with AdamW bounds one with any optimizer from below, and is quickly planned. The
    others are planned in the order of that bound, until it says that no further one is faster.

    Args:
        shape: the model.
        ranks: how many there are.
        batch: of a step.
        optimizer: of the matrices.
        machine: gives rates.
        limit: bytes of a device's memory.
        bucket_sizes: as `Run.bucket_size`.
        weight_bytes: as `Run.weight_bytes`.
        most: how many to find.
    """
    failures: Counter[str] = Counter()
    examples: dict[str, str] = {}

    def fail(reason: str) -> None:
        reason = reason.partition(": take")[0]  # nobody gave the sizes that are tried here
        kind = re.sub(r"\d[\d.]*", "N", reason)
        failures[examples.setdefault(kind, reason)] += 1

    bounds = []
    for sizes in _sizes(shape, ranks, machine.ranks_per_node):
        try:
            topology = Topology(
                **sizes,
                account_for_ends=shape.needs_ends(sizes["pp"]),
                ranks_per_node=machine.ranks_per_node,
            )
            run = Run(shape, topology, _ADAMW, weight_bytes=weight_bytes)
            bound = predict(run, batch, machine)
        except ValueError as error:
            fail(str(error))
            continue
        kept = ("weights", "gradients", "activations")
        least = sum(bound.memory[kind].busiest for kind in kept)
        if least > limit:
            fail(f"weights, gradients and activations need {least / 2**30:.0f} GiB")
            continue
        bounds.append((bound.seconds - bound.step.total, topology))
    bounds.sort(key=lambda item: item[0])
    found: list[Prediction] = []
    for place, (bound_seconds, topology) in enumerate(bounds):
        if len(found) >= most and found[most - 1].seconds <= bound_seconds:
            return Found(found[:most], failures, len(bounds) - place + len(found) - most)
        for bucket_size in bucket_sizes:
            run = Run(shape, topology, optimizer, bucket_size, weight_bytes)
            try:
                prediction = predict(run, batch, machine)
            except ValueError as error:
                fail(str(error))
                continue
            if prediction.bytes_needed > limit:
                fail(f"memory: {prediction.bytes_needed / 2**30:.0f} GiB with {optimizer.label}")
                continue
            found.append(prediction)
        found.sort(key=lambda prediction: prediction.seconds)
    return Found(found[:most], failures, max(len(found) - most, 0))


def _sizes(shape: GptShape, ranks: int, ranks_per_node: int) -> Iterator[dict[str, int]]:
    """Tensor parallelism within a node; context parallelism in powers of two from 4096 tokens."""
    experts = 1 if shape.experts is None else shape.experts.count
    contexts = [cp for cp in (1, 2, 4, 8, 16) if cp == 1 or shape.sequence // cp >= 4096]
    for tp in divisors(ranks_per_node):
        for pp in range(1, shape.layers + 1):
            for cp in contexts:
                for ep in divisors(experts):
                    if ranks % (tp * pp * cp) == 0:
                        yield {
                            "tp": tp,
                            "pp": pp,
                            "cp": cp,
                            "ep": ep,
                            "dp": ranks // (tp * pp * cp),
                        }
