"""All that is planned of a run, over the ranks of all its pipeline stages."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dion_tools.plan.compute import (
    activation_bytes,
    model_work,
    optimizer_work,
)
from megatron_dion_tools.plan.hardware import Hardware
from megatron_dion_tools.plan.memory import KINDS, memory
from megatron_dion_tools.plan.stage import Run, Stage
from megatron_dion_tools.plan.timing import (
    OptimizerTime,
    iteration_time,
    optimizer_time,
    stage_time,
)
from megatron_dion_tools.plan.topology import Batch
from megatron_dion_tools.plan.traffic import Traffic, traffic

ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Figure:
    """Of one quantity, what the rank with most has, and the mean of all ranks."""

    busiest: float
    mean: float


@dataclass(frozen=True)
class Collective:
    """Bytes that a rank sends in a step in one kind of collective.

    Attributes:
        sent: all of them.
        network: those that leave the node.
        calls: number of calls of the stage with most.
        when: as in `traffic.Sent`.
        is_estimate: as there.
    """

    sent: Figure
    network: Figure
    calls: int
    when: str
    is_estimate: bool


@dataclass(frozen=True)
class Prediction:
    """What is planned of a run.

    Attributes:
        run: the run.
        memory: bytes by kind; `busiest` are those of the rank that has most in all.
        collectives: by name.
        operations: of the optimizer's products and factorizations.
        model_operations: forward and backward, of all micro batches.
        step: time of the optimizer's step in the stage where it is longest.
        seconds: of an iteration.
    """

    run: Run
    memory: dict[str, Figure]
    collectives: dict[str, Collective]
    operations: Figure
    model_operations: Figure
    step: OptimizerTime
    seconds: float

    @property
    def bytes_needed(self) -> float:
        """Memory of the rank that needs most."""
        return sum(figure.busiest for figure in self.memory.values())

    def sent(self, when: str | None = None, network: bool | None = None) -> float:
        """Bytes of the busiest ranks' collectives, of all or some times, on all links or one."""
        total = 0.0
        for found in self.collectives.values():
            if when in (None, found.when):
                on_network = found.network.busiest
                total += {
                    None: found.sent.busiest,
                    True: on_network,
                    False: found.sent.busiest - on_network,
                }[network]
        return total


def predict(run: Run, batch: Batch, machine: Hardware) -> Prediction:
    """Plans all stages of a run that differ.

    Raises:
        ValueError: Megatron could not divide the model in this way, in words that name flags.
    """
    micro_batches = batch.micro_batches(run.topology)
    stages = list(distinct_stages(run))
    counts = [count for _, count in stages]
    memories, sent, works, models = [], [], [], []
    for stage, _ in stages:
        memories.append({**memory(stage), ACTIVATIONS: np.array(activation_bytes(stage, batch))})
        sent.append(traffic(stage, batch))
        works.append(optimizer_work(stage, machine.device))
        models.append(model_work(stage, batch))
    steps = [
        optimizer_time(work, found, machine, run.optimizer.precision)
        for work, found in zip(works, sent, strict=True)
    ]
    times = [
        stage_time(model, found, machine, micro_batches, run.weight_bytes)
        for model, found in zip(models, sent, strict=True)
    ]
    operations = [work.operations for work in works]
    passes = [micro_batches * (model.forward + model.backward) for model in models]
    return Prediction(
        run=run,
        memory=_memory(memories, counts),
        collectives=_collectives(sent, counts),
        operations=_figure(operations, counts),
        model_operations=_figure([np.array(value) for value in passes], counts),
        step=max(steps, key=lambda step: step.total),
        seconds=iteration_time(times, steps, micro_batches, run.topology.pp),
    )


def distinct_stages(run: Run) -> Iterator[tuple[Stage, int]]:
    """One of each kind of stage, and how many there are of it.

    Stages are of a kind if they have as many layers of each kind, and are neither first nor last.
    """
    found: dict[tuple[object, ...], list[int]] = {}
    shape, topology = run.shape, run.topology
    for index in range(topology.pp):
        layers = shape.stage_layers(topology.pp, index, topology.account_for_ends)
        kinds = tuple(shape.has_experts(layer) for layer in layers)
        ends = index == 0, index == topology.pp - 1
        found.setdefault((kinds, ends), []).append(index)
    for indices in found.values():
        yield Stage(run, indices[0]), len(indices)


def _memory(memories: list[dict[str, NDArray[Any]]], counts: list[int]) -> dict[str, Figure]:
    totals = [sum(found.values()) for found in memories]
    worst = max(range(len(totals)), key=lambda i: float(np.max(totals[i])))
    place = np.unravel_index(np.argmax(totals[worst]), np.shape(totals[worst]))
    return {
        kind: Figure(
            float(np.broadcast_to(memories[worst][kind], np.shape(totals[worst]))[place]),
            _mean([found[kind] for found in memories], counts),
        )
        for kind in (*KINDS, ACTIVATIONS)
    }


def _collectives(sent: list[Traffic], counts: list[int]) -> dict[str, Collective]:
    names = dict.fromkeys(name for found in sent for name in found)
    zero = np.zeros(1)
    result = {}
    for name in names:
        here = [found[name] for found in sent if name in found]
        result[name] = Collective(
            sent=_figure([np.asarray(f[name].bytes) if name in f else zero for f in sent], counts),
            network=_figure(
                [np.asarray(f[name].network) if name in f else zero for f in sent], counts
            ),
            calls=max(found.calls for found in here),
            when=here[0].when,
            is_estimate=here[0].is_estimate,
        )
    return result


def _figure(values: list[NDArray[Any]], counts: list[int]) -> Figure:
    return Figure(max(float(np.max(value)) for value in values), _mean(values, counts))


def _mean(values: list[NDArray[Any]], counts: list[int]) -> float:
    """Over the ranks of all stages, of which there are so many of each kind."""
    means = [float(np.mean(value)) for value in values]
    return sum(m * n for m, n in zip(means, counts, strict=True)) / sum(counts)
