"""All that is planned of a run, and a model of times: arithmetic on counts and assumed rates."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_dion_tools.plan.costs import activations, gradients_and_weights, memory, model_work
from megatron_dion_tools.plan.dion import dion
from megatron_dion_tools.plan.hardware import Hardware
from megatron_dion_tools.plan.stage import Run, Stage
from megatron_dion_tools.plan.topology import topologies
from megatron_dion_tools.plan.updates import ADAMW_BYTES, Collective, Update, adamw, muon

ASSUMPTIONS = """\
Rates: {source}.
Times are a model, not measured. Products take {product_share:.0%} of the sheet's rate (the model's
in the type of its weights, Muon's in bf16, Dion's with B, M and W in TF32 or what
--dion-fp32-matmul-prec says, those that orthonormalize in float32), factorizations
{factorization_share:.0%} of its float32 rate, memory {bandwidth_share:.0%}, links {link_share:.0%},
a collective {latency:.0e} s besides. Both links work at a time. A step is the sum of its parts,
each on the rank where it takes longest; nothing of Dion's exchange is hidden. The host takes
{launch:.0e} s to start a kernel, and the step is no shorter than all of that. Gradients are reduced
behind a micro batch's backward pass and weights gathered behind its forward pass; what takes longer
is exposed. The pipeline is 1F1B."""

_UPDATES = {"adamw": adamw, "muon": muon, "dion": dion}


@dataclass(frozen=True)
class Prediction:
    """What is planned of a run.

    Attributes:
        run: the run.
        memory: bytes by kind, of the rank that needs most.
        collectives: of the stage that sends most in each.
        operations: of the optimizer, on the rank with most.
        launches: kernels that the optimizer starts, in the stage with most, about.
        step: seconds of the optimizer's step by part, in the stage where it is longest; `starting`
            is by how much it takes longer to start its kernels.
        seconds: of an iteration.
    """

    run: Run
    memory: dict[str, float]
    collectives: list[Collective]
    operations: float
    launches: float
    step: dict[str, float]
    seconds: float

    @property
    def bytes_needed(self) -> float:
        """Memory of the rank that needs most."""
        return _total(self.memory)

    @property
    def step_seconds(self) -> float:
        """Seconds of the optimizer's step."""
        return _total(self.step)

    def sent(self, network: bool, when: str | None = None) -> float:
        """Bytes that leave the node or that stay on it, of collectives of all times or of one."""
        return sum(
            one.network if network else one.bytes - one.network
            for one in self.collectives
            if when in (None, one.when)
        )


def predict(run: Run, machine: Hardware) -> Prediction:
    """Plans all stages of a run that differ.

    Raises:
        ValueError: Megatron could not divide the model in this way, in words that name flags.
    """
    rate = (machine.half if run.weight_bytes == 2 else machine.single) * machine.product_share
    memories, operations, launches, steps, slots, exposed = [], [], [], [], [], []
    most_sent: dict[tuple[str, str], Collective] = {}
    for stage in _distinct_stages(run):
        update = _UPDATES[run.optimizer.kind](stage)
        all_collectives = [*gradients_and_weights(stage), *activations(stage), *update.collectives]
        collectives = [one for one in all_collectives if one.bytes]
        for one in collectives:
            key = one.name, one.group.link
            most_sent[key] = max(one, most_sent.get(key, one), key=lambda each: each.bytes)
        times = ("layer", "forward", "backward", "step")
        waits = {when: _seconds(collectives, machine, when) for when in times}
        forward, backward = model_work(stage)
        memories.append(memory(stage, update))
        operations.append(update.products + update.float32_products + update.factorizations)
        launches.append(update.launches)
        step = {**_computing(stage, update, machine), "exchange": waits["step"]}
        starting = max(update.launches * machine.launch - _total(step), 0.0)
        steps.append({**step, "starting": starting})
        slots.append((forward + backward) / rate + waits["layer"] / run.micro_batches)
        exposed.append(
            max(waits["backward"] - backward / rate, 0) + max(waits["forward"] - forward / rate, 0)
        )
    step = max(steps, key=_total)
    # A pipeline takes as long as its slowest stage; so do what is exposed, and the step.
    seconds = (run.micro_batches + run.topology.pp - 1) * max(slots) + max(exposed) + _total(step)
    return Prediction(
        run=run,
        memory=max(memories, key=_total),
        collectives=list(most_sent.values()),
        operations=max(operations),
        launches=max(launches),
        step=step,
        seconds=seconds,
    )


def search(run: Run, ranks: int, machine: Hardware, limit: float) -> list[Prediction]:
    """Try all `topologies` of a number of ranks, with default buckets and with one.

    Returns those that need at most `limit` bytes of a device's memory, the fastest first. Topology
    and buckets of `run` do not count.
    """
    predictions = []
    for topology in topologies(run.shape, ranks, machine.ranks_per_node):
        for bucket_size in (None, 0):
            try:
                other = replace(run, topology=topology, bucket_size=bucket_size)
                predictions.append(predict(other, machine))
            except ValueError:  # Megatron cannot divide the model so
                break
    fitting = (one for one in predictions if one.bytes_needed <= limit)
    return sorted(fitting, key=lambda one: one.seconds)


def _distinct_stages(run: Run) -> Iterable[Stage]:
    """The first stage, the last one, and of others one for each number of layers."""
    stages: dict[object, Stage] = {}
    for index in range(run.topology.pp):
        stage = Stage(run, index)
        stages.setdefault((len(stage.layers), stage.is_first, stage.is_last), stage)
    return stages.values()


def _computing(stage: Stage, update: Update, machine: Hardware) -> dict[str, float]:
    """Seconds of what an optimizer's step computes."""
    rates = {"highest": machine.single, "high": machine.tf32, "medium": machine.half}
    optimizer = stage.run.optimizer
    rate = rates[optimizer.dion.fp32_matmul_prec if optimizer.kind == "dion" else "medium"]
    products = update.products / rate + update.float32_products / machine.single
    factorizations = update.factorizations / machine.single
    passed = update.bytes_passed + ADAMW_BYTES * stage.others / stage.group.size
    return {
        "products": products / machine.product_share,
        "factorizations": factorizations / machine.factorization_share,
        "passes": passed / machine.bandwidth / machine.bandwidth_share,
    }


def _seconds(collectives: Iterable[Collective], machine: Hardware, when: str) -> float:
    """Of all collectives of a time: latency of the calls, and the slower of both links."""
    seconds = 0.0
    for one in collectives:
        if one.when == when:
            node = (one.bytes - one.network) / machine.node_link
            slower = max(one.network / machine.network, node)
            seconds += one.calls * machine.latency + slower / machine.link_share
    return seconds


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())
