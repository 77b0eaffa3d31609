"""Check that the clocks of all nodes agree."""

from collections.abc import Mapping

from megatron_dion_tools.doctor.findings import Finding, ok, warning

# Seconds; with more, the files and log lines of several nodes do not sort.
TOLERATED = 1.0


def judge(clocks: Mapping[int, float], hosts: Mapping[int, str]) -> Finding:
    """Compare the times that all ranks read at the same moment.

    Args:
        clocks: By rank. The moment is as exact as a message that reaches them all.
        hosts: The machine of each rank.
    """
    first, last = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
    skew = clocks[last] - clocks[first]
    text = f"within {skew:.2g} s"
    if skew <= TOLERATED:
        return ok(text)
    slow, fast = (f"rank {rank} on {hosts[rank]}" for rank in (first, last))
    return warning(f"{text}: {fast} is ahead of {slow}", "start chrony or ntpd on all nodes")
