"""Sets of ranks in words."""

from collections.abc import Iterable


def in_words(ranks: Iterable[int]) -> str:
    """Name ranks briefly: `rank 3`, `ranks 0-2, 7`."""
    numbers = sorted(ranks)
    return f"rank{'' if len(numbers) == 1 else 's'} {in_numbers(numbers)}"


def in_numbers(ranks: Iterable[int]) -> str:
    """Write ranks as ranges: `0-2, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
