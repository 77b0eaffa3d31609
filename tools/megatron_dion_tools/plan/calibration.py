"""Rates of the CPU of this machine, one thread a rank: the figures of the preset `cpu`.

OMP_NUM_THREADS=1 python -m megatron_dion_tools.plan.calibration
"""

import os
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

_SIZE, _NUMBERS, _REPEATS = 1024, 1 << 23, 9


def product_rate() -> float:
    """Float32 operations per second of a (1024, 1024) product."""
    left, right = torch.randn(2, _SIZE, _SIZE)
    return 2 * _SIZE**3 / _seconds(lambda: left @ right)


def factorization_rate() -> float:
    """Operations per second of a Householder QR of (1024, 256) with its Q."""
    rows, rank = _SIZE, _SIZE // 4
    matrix = torch.randn(rows, rank)
    operations = 4 * rows * rank**2 - 4 / 3 * rank**3
    return operations / _seconds(lambda: torch.linalg.qr(matrix))


def bandwidth() -> float:
    """Bytes per second that an addition in place reads and writes."""
    target, source = torch.zeros(2, _NUMBERS)
    return 12 * _NUMBERS / _seconds(lambda: target.add_(source))


def _exchange(rank: int, port: int) -> None:
    """Prints the bytes per second that a rank of two sends in an all_to_all, and its latency."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    large, small = torch.zeros(_NUMBERS), torch.zeros(2)
    found = [
        _seconds(lambda t=tensor: dist.all_to_all_single(torch.empty_like(t), t))  # type: ignore[misc]
        for tensor in (large, small)
    ]
    if rank == 0:
        print(f"node_link: {large.nbytes / 2 / found[0]:.3g}\nlatency: {found[1]:.2g}")
    dist.destroy_process_group()


def _seconds(work: Callable[[], object]) -> float:
    """The median of some repeats, after one that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def main() -> None:
    """Print what a file for `--hardware` needs."""
    torch.set_num_threads(1)
    print(f"single: {product_rate():.3g}\nfactorizations: {factorization_rate():.3g}")
    print(f"bandwidth: {bandwidth():.3g}")
    start_processes(_exchange, args=(29999,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
