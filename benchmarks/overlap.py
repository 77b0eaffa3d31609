"""How long does a step wait for communication, with one set of weights, two, and more?

With several sets, one computes while the collective of another is under way. gloo's threads compete
with the computation for the same cores, so there is a second, simulated link as well: a collective
is complete when gloo's is and the link has carried its bytes. The link carries one collective after
the other, each in the latency plus its bytes by the bandwidth. Waiting for it takes no processor
time. What a rank waits for a slower one is in the figures, too. On CPUs only: with NCCL a rank that
waits for a collective goes on.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from benchmarks._common import (
    Case,
    Goal,
    Row,
    in_world,
    interleaved,
    make_parser,
    parse,
    ratio,
    report,
    summary,
)
from benchmarks._models import Topology, dion_on_pieces, gpt
from megatron_dion import Dion, DionConfig
from megatron_dion.sharding import sets
from megatron_dion_tools.plan import GptShape

LIMIT = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each link and number of sets."""
    args = _parse(argv)
    shape = gpt(args.hidden, args.layers)
    measured = in_world(args.topology.size, _measure, shape, args)
    if measured is not None:
        rows = _rows(measured, args)
        goals = [
            Goal(f"{row['link']}, {row['sets']} sets: exposed, to one set", ratio, LIMIT)
            for row in rows
            if row["sets"] != 1 and isinstance(ratio := row["to_one"], float)
        ]
        report(args, {"overlap": rows}, goals)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=7, devices=["cpu"])
    parser.add_argument("--topology", type=Topology.parse, default=Topology(2, 1), metavar="TPxDP")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--fraction", type=Fraction, default=Fraction(1, 4))
    parser.add_argument("--sets", type=int, nargs="+", default=[1, 2, 4], help="1 among them")
    parser.add_argument("--latency", type=float, default=1.0, help="milliseconds, simulated")
    parser.add_argument("--bandwidth", type=float, default=0.25, help="GB/s, simulated")
    return parse(parser, argv)


@dataclass
class Link:
    """Carries collectives one after the other, and counts for how long they were waited for.

    Attributes:
        latency: seconds; None for no link beside the real one.
        bandwidth: bytes a second.
        free_at: when it has carried all that it has been given.
        waited: seconds.
    """

    latency: float | None
    bandwidth: float
    free_at: float = 0.0
    waited: float = 0.0

    def carry(self, nbytes: float) -> float:
        """When so many bytes will have arrived."""
        if self.latency is not None:
            start = max(self.free_at, time.perf_counter())
            self.free_at = start + self.latency + nbytes / self.bandwidth
        return self.free_at


@dataclass
class _Work:
    """A collective that is complete when the link has carried it."""

    real: Any
    link: Link
    arrives_at: float

    def wait(self) -> None:
        start = time.perf_counter()
        self.real.wait()
        time.sleep(max(self.arrives_at - time.perf_counter(), 0.0))
        self.link.waited += time.perf_counter() - start


@contextmanager
def _over(link: Link) -> Iterator[None]:
    """Lets the step's collectives pass over a link."""
    reduce_: Any = dist.all_reduce
    gather: Any = dist.all_gather_into_tensor
    exchange: Any = dist.all_to_all_single

    def all_reduce(tensor: Tensor, *args: Any, group: Any, **options: Any) -> _Work:
        arrival = link.carry(2 * tensor.nbytes * (group.size() - 1) / group.size())
        return _Work(reduce_(tensor, *args, group=group, **options), link, arrival)

    def all_gather(received: Tensor, sent: Tensor, *, group: Any, **options: Any) -> _Work:
        arrival = link.carry(sent.nbytes * (group.size() - 1))
        return _Work(gather(received, sent, group=group, **options), link, arrival)

    def all_to_all(
        received: Tensor, sent: Tensor, *sizes: list[int], group: Any, **options: Any
    ) -> _Work:
        others = sum(sizes[1]) - sizes[1][group.rank()]
        arrival = link.carry(others * sent.itemsize)
        return _Work(exchange(received, sent, *sizes, group=group, **options), link, arrival)

    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(dist, "all_gather_into_tensor", all_gather),
        mock.patch.object(dist, "all_to_all_single", all_to_all),
    ):
        yield


@dataclass
class Measured:
    """What a rank reports of a case.

    Attributes:
        step: seconds of a step, for each round.
        exposed: of these, waiting for collectives.
    """

    step: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)


def _measure(shape: GptShape, args: argparse.Namespace) -> dict[tuple[str, int], Measured]:
    groups = args.topology.join()
    config = DionConfig(rank_fraction=float(args.fraction))
    links = {
        dist.get_backend(): Link(None, 1.0),
        "simulated": Link(args.latency / 1e3, args.bandwidth * 1e9),
    }
    found: dict[tuple[str, int], Measured] = {}
    cases: dict[str, Case] = {}
    for count in args.sets:
        with mock.patch.object(sets, "IN_FLIGHT", count):
            optimizer = dion_on_pieces(shape, args.topology, config, groups, args.device)
            optimizer.init_state()
        for name, link in links.items():
            found[name, count] = Measured()
            cases[f"{name} {count}"] = Case(_step(optimizer, link, found[name, count]))
    for case, timing in zip(found, interleaved(cases, args.repeats).values(), strict=True):
        found[case].step = timing.wall
        del found[case].exposed[0]  # the first round is not counted
    return found


def _step(optimizer: Dion, link: Link, measured: Measured) -> Callable[[], None]:
    def step() -> None:
        link.waited = 0.0
        with _over(link):
            optimizer.step()
        measured.exposed.append(link.waited)

    return step


def _rows(ranks: Sequence[dict[tuple[str, int], Measured]], args: argparse.Namespace) -> list[Row]:
    """Means over the ranks, round by round."""
    rows: list[Row] = []
    for link, count in ranks[0]:
        exposed = _mean([rank[link, count].exposed for rank in ranks])
        one = _mean([rank[link, 1].exposed for rank in ranks])
        simulated = f"simulated: {args.latency:g} ms, {args.bandwidth:g} GB/s"
        rows.append(
            {
                "topology": str(args.topology),
                "link": simulated if link == "simulated" else link,
                "sets": count,
                "step_ms": 1e3 * summary(_mean([rank[link, count].step for rank in ranks])).median,
                "exposed_ms": 1e3 * summary(exposed).median,
                "to_one": ratio(exposed, one).median,
                "to_one_low": ratio(exposed, one).low,
                "to_one_high": ratio(exposed, one).high,
            }
        )
    return rows


def _mean(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*of_ranks, strict=True)]


if __name__ == "__main__":
    main()
