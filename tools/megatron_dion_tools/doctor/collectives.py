"""Checks of what ranks compute together and of the messages between them, with known answers."""

import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from megatron_dion_tools.doctor.findings import FAILED, OK, WARNING, Finding
from megatron_dion_tools.doctor.mailbox import Mailbox
from megatron_dion_tools.doctor.report import ranges

COUNT = 4096
SMALL, LARGE = 8, {"cpu": 2**23, "cuda": 2**26}  # bytes of a message
SUSPECT = "take the node out and try again without it: a GPU or a link corrupts data"


def open_group(mailbox: Mailbox, seconds: float) -> Finding:
    """Make the process group that the other checks use, of NCCL or gloo.

    Args:
        mailbox: Of all ranks; they call this together.
        seconds: How long a check of this process group may take.
    """
    backend = "nccl" if _device().type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("group", mailbox.connect()),
        rank=mailbox.rank,
        world_size=mailbox.size,
        timeout=timedelta(seconds=3 * seconds),  # after it NCCL ends the process
    )
    return Finding(OK, f"{backend} on {_device().type}", same=True)


def all_reduce(rank: int, size: int) -> Finding:
    """Sum integers of all ranks, so that there is one right answer."""
    sums = _piece(rank)
    dist.all_reduce(sums)
    wrong = int((sums != _piece(0) * (size * (size + 1) // 2)).sum())
    if wrong:
        return Finding(FAILED, f"{wrong} of {COUNT} sums are wrong here", SUSPECT)
    return Finding(OK, f"right sums over {size} ranks")


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _piece(rank: int) -> torch.Tensor:
    return torch.arange(1, COUNT + 1, device=_device()) * (rank + 1)


class Link(NamedTuple):
    """What was measured between two ranks, in seconds and bytes per second."""

    first: int
    second: int
    latency: float
    bandwidth: float

    def __str__(self) -> str:
        speed = f"{self.latency * 1e6:.0f} us, {self.bandwidth / 1e9:.2f} GB/s"
        return f"{self.first}-{self.second}: {speed}"


def ring(size: int) -> list[tuple[int, int]]:
    """Return each rank with the next one; pairs that follow each other mostly share no rank."""
    chain = [(rank, rank + 1) for rank in range(size - 1)]
    return chain[0::2] + chain[1::2] + ([(size - 1, 0)] if size > 2 else [])


def messages(rank: int, size: int, links: list[Link]) -> Finding:
    """Send messages to both neighbours in a ring and back.

    Args:
        rank: This rank.
        size: The number of ranks; they call this together.
        links: Gets the links of which this rank is the first.
    """
    wrong = set()
    for first, second in ring(size):
        if rank not in (first, second):
            continue
        leads = rank == first
        peer = second if leads else first
        seconds = []
        for count, turns in ((SMALL, 30), (LARGE[_device().type], 5)):
            sent, expected = _message(rank, count), _message(peer, count)
            received = torch.zeros_like(expected)
            # The shortest of several turns; the first one makes the connection.
            seconds.append(min(_turn(leads, peer, sent, received) for _ in range(turns)) / 2)
            if not torch.equal(received, expected):
                wrong.add(peer)
        if leads:
            links.append(Link(first, second, seconds[0], LARGE[_device().type] / seconds[1]))
    if wrong:
        return Finding(FAILED, f"messages from rank {ranges(wrong)} arrive corrupted", SUSPECT)
    return Finding(OK, "messages arrive as they were sent" if size > 1 else "one rank, none")


def _message(sender: int, count: int) -> torch.Tensor:
    return ((torch.arange(count, device=_device()) + sender) % 251).to(torch.uint8)


def _turn(leads: bool, peer: int, sent: torch.Tensor, received: torch.Tensor) -> float:
    """Pass a message to and fro, and return the seconds that it took."""
    start = time.perf_counter()
    if leads:
        dist.send(sent, peer)
    dist.recv(received, peer)
    if not leads:
        dist.send(sent, peer)
    if sent.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def judge_links(links: Sequence[Link], hosts: Mapping[int, str]) -> Finding:
    """Name the slowest links, and warn of links with less than half the usual bandwidth.

    Args:
        links: The links of all ranks.
        hosts: The machine of each rank: links within one are not compared with those between two.
    """
    texts, slow = [], []
    for kind, is_local in (("within a node", True), ("between nodes", False)):
        alike = [link for link in links if (hosts[link.first] == hosts[link.second]) == is_local]
        if alike:
            slowest = min(alike, key=lambda link: link.bandwidth)
            latency = max(link.latency for link in alike)
            text = f"slowest of {len(alike)} is {slowest}, longest latency {latency * 1e6:.0f} us"
            texts.append(f"{kind}: {text}")
            usual = median(link.bandwidth for link in alike)
            slow += [link for link in alike if len(alike) > 2 and link.bandwidth < usual / 2]
    if slow:
        fix = "compare the cables, cards and NCCL_DEBUG=INFO of these ranks with others"
        return Finding(WARNING, f"slow {', '.join(map(str, slow))}; {'; '.join(texts)}", fix)
    return Finding(OK, "; ".join(texts))
