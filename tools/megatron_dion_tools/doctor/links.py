"""Time the link between each rank and the next one."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from megatron_dion_tools.doctor.collectives import rank_device
from megatron_dion_tools.doctor.findings import Finding, failed, ok, warning
from megatron_dion_tools.doctor.ranks import in_words
from megatron_dion_tools.doctor.world import World

SMALL = 8  # bytes
LARGE = {"cpu": 2**23, "cuda": 2**26}

# A link this much slower than the median of its kind is not noise.
SUSPICIOUS = 0.5


@dataclass(frozen=True)
class Link:
    """What was measured between two ranks, in seconds and bytes per second."""

    first: int
    second: int
    latency: float
    bandwidth: float

    def __str__(self) -> str:
        return (
            f"{self.first}-{self.second}:"
            f" {self.latency * 1e6:.0f} us, {self.bandwidth / 1e9:.2f} GB/s"
        )


def ring(size: int) -> list[tuple[int, int]]:
    """Pair each rank with the next, in an order in which nobody waits for long.

    Pairs that share no rank follow each other and run at the same time.
    """
    chain = [(rank, rank + 1) for rank in range(size - 1)]
    closing = [(size - 1, 0)] if size > 2 else []
    return chain[0::2] + chain[1::2] + closing


def exchange(world: World, into: list[Link]) -> Finding:
    """Send messages to both neighbours and back; whoever is named first keeps the time.

    Args:
        world: All ranks; they call this together.
        into: The links that this rank has timed.
    """
    device = rank_device()
    large = LARGE[device.type]
    corrupted = []
    for first, second in ring(world.size):
        if world.rank not in (first, second):
            continue
        leads = world.rank == first
        talk = _Talk(world.rank, second if leads else first, leads, device)
        latency, small_whole = talk.shortest(SMALL, turns=30)
        duration, large_whole = talk.shortest(large, turns=4)
        if not (small_whole and large_whole):
            corrupted.append(talk.peer)
        if leads:
            into.append(Link(first, second, latency, large / duration))
    if corrupted:
        return failed(
            f"messages from {in_words(corrupted)} arrive with wrong content",
            "take the node out and try again without it",
        )
    return ok("messages arrive as they were sent" if world.size > 1 else "none, with one rank")


@dataclass(frozen=True)
class _Talk:
    """One rank's side of messages to and fro."""

    rank: int
    peer: int
    leads: bool
    device: torch.device

    def shortest(self, count: int, turns: int) -> tuple[float, bool]:
        """Returns half the shortest time for a message and its echo, and whether it came whole."""
        sent, expected = (_message(one, count, self.device) for one in (self.rank, self.peer))
        received = torch.zeros_like(expected)
        self._turn(sent, received)  # connections are made by the first message
        seconds = min(self._timed_turn(sent, received) for _ in range(turns)) / 2
        return seconds, torch.equal(received, expected)

    def _timed_turn(self, sent: torch.Tensor, received: torch.Tensor) -> float:
        start = time.perf_counter()
        self._turn(sent, received)
        return time.perf_counter() - start

    def _turn(self, sent: torch.Tensor, received: torch.Tensor) -> None:
        if self.leads:
            dist.send(sent, self.peer)
            dist.recv(received, self.peer)
        else:
            dist.recv(received, self.peer)
            dist.send(sent, self.peer)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _message(sender: int, count: int, device: torch.device) -> torch.Tensor:
    return ((torch.arange(count, device=device) + sender) % 251).to(torch.uint8)


def judge(links: Sequence[Link], hosts: Mapping[int, str]) -> Finding:
    """Name the slowest links, and warn of one that is much slower than others of its kind.

    Args:
        links: Those of all ranks.
        hosts: The machine of each rank: links within one are not compared with those between two.
    """
    if not links:
        return ok("none")
    kinds: dict[str, list[Link]] = {"within a node": [], "between nodes": []}
    for link in links:
        one_node = hosts[link.first] == hosts[link.second]
        kinds["within a node" if one_node else "between nodes"].append(link)
    texts = [f"{name}: {_slowest(kind)}" for name, kind in kinds.items() if kind]
    slow = [str(link) for kind in kinds.values() for link in _outliers(kind)]
    if slow:
        return warning(
            f"slow {', '.join(slow)}; {'; '.join(texts)}",
            "compare the cables, cards and NCCL_DEBUG=INFO of these ranks with others",
        )
    return ok("; ".join(texts))


def _slowest(links: Sequence[Link]) -> str:
    worst = min(links, key=lambda link: link.bandwidth)
    laziest = max(links, key=lambda link: link.latency)
    text = f"slowest of {len(links)} is {worst}"
    return text if laziest is worst else f"{text}, the longest latency has {laziest}"


def _outliers(links: Sequence[Link]) -> list[Link]:
    if len(links) < 3:
        return []
    usual = median(link.bandwidth for link in links)
    return [link for link in links if link.bandwidth < SUSPICIOUS * usual]
