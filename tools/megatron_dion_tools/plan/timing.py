"""A model of times. It is arithmetic on counts and assumed rates: nothing in it was measured."""

from dataclasses import dataclass

import numpy as np

from megatron_dion_tools.plan.compute import ModelWork, Work
from megatron_dion_tools.plan.hardware import Hardware
from megatron_dion_tools.plan.traffic import Sent, Traffic

ASSUMPTIONS = """\
Times are a model, not measured. Products take {product_share:.0%} of the sheet's rate (the model's
in the type of its weights, Muon's in bf16, Dion's with B, M and W in TF32 or what
--dion-fp32-matmul-prec says, those that orthonormalize in float32), factorizations
{factorization_share:.0%} of its float32 rate, memory {bandwidth_share:.0%}, links {link_share:.0%},
a collective {latency_us:.0f} us besides. Both links work at a time. A step is the sum of its parts,
each on the rank where it takes longest; nothing of Dion's exchange is hidden. Gradients are reduced
behind a micro batch's backward pass and weights gathered behind its forward pass; what takes longer
is exposed. The pipeline is 1F1B."""


@dataclass(frozen=True)
class OptimizerTime:
    """Seconds of an optimizer's step, part by part.

    Attributes:
        products: matrix products.
        factorizations: QR, Cholesky, triangular solves.
        passes: element by element.
        exchange: collectives.
    """

    products: float
    factorizations: float
    passes: float
    exchange: float

    @property
    def total(self) -> float:
        return self.products + self.factorizations + self.passes + self.exchange


def assumptions(machine: Hardware) -> str:
    """What the times assume, in words."""
    return f"{machine.name}: {machine.source}.\n" + ASSUMPTIONS.format(
        **vars(machine), latency_us=machine.latency * 1e6
    )


def optimizer_time(
    work: Work, traffic: Traffic, machine: Hardware, precision: str
) -> OptimizerTime:
    """The time of an optimizer's step on one stage.

    Args:
        work: of the ranks.
        traffic: of the stage; what is in the way of the step counts.
        machine: gives rates.
        precision: of products, one of `algorithm.PRECISIONS`.
    """
    rates = {"highest": machine.single, "high": machine.tf32, "medium": machine.half}
    products = work.products / rates[precision] + work.float32_products / machine.single
    return OptimizerTime(
        products=np.max(products) / machine.product_share,
        factorizations=np.max(work.factorizations) / (machine.single * machine.factorization_share),
        passes=np.max(work.passes) / (machine.bandwidth * machine.bandwidth_share),
        exchange=_time(traffic, machine, "step"),
    )


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage, without its optimizer's step.

    Attributes:
        micro_batch: forward and backward pass of a micro batch, with what is in their way.
        exposed: what of the reduction of gradients and the gathering of weights is not hidden.
    """

    micro_batch: float
    exposed: float


def stage_time(
    work: ModelWork, traffic: Traffic, machine: Hardware, micro_batches: int, weight_bytes: int
) -> StageTime:
    """The time of a micro batch, and what is exposed once in a step."""
    rate = (machine.half if weight_bytes == 2 else machine.single) * machine.product_share
    forward, backward = work.forward / rate, work.backward / rate
    in_the_way = _time(traffic, machine, "layer") / micro_batches
    exposed = max(_time(traffic, machine, "backward") - backward, 0) + max(
        _time(traffic, machine, "forward") - forward, 0
    )
    return StageTime(forward + backward + in_the_way, exposed)


def iteration_time(
    stages: list[StageTime], steps: list[OptimizerTime], micro_batches: int, pipeline: int
) -> float:
    """A pipeline takes as long as its slowest stage; so do what is exposed, and the step."""
    slots = micro_batches + pipeline - 1
    return (
        slots * max(stage.micro_batch for stage in stages)
        + max(stage.exposed for stage in stages)
        + max(step.total for step in steps)
    )


def _time(traffic: Traffic, machine: Hardware, when: str) -> float:
    return sum(collective_time(sent, machine) for sent in traffic.values() if sent.when == when)


def collective_time(sent: Sent, machine: Hardware) -> float:
    """Seconds of one kind of collective: latency of its calls, and the slower of both links."""
    network = float(np.max(sent.network)) / machine.network
    on_node = float(np.max(sent.bytes - sent.network)) / machine.node_link
    return sent.calls * machine.latency + max(network, on_node) / machine.link_share
