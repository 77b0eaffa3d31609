"""Which iterations a run did since which of its starts."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_dion.megatron.run_directory import Record


class Session(NamedTuple):
    """What a run did from one of its starts to the next.

    Attributes:
        start: the line of starts.jsonl.
        iterations: training records, one or more, each with the tokens of its iteration.
    """

    start: Record
    iterations: list[tuple[Record, int]]

    @property
    def settled(self) -> list[tuple[Record, int]]:
        """All iterations but the first, which sets up all things."""
        return self.iterations[1:]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.iterations)

    @property
    def tokens_per_second(self) -> float:
        """The throughput of settled iterations; of the only one, if there is one."""
        found = self.settled or self.iterations
        return sum(tokens for _, tokens in found) / sum(r["iteration_seconds"] for r, _ in found)


def sessions(training: Sequence[Record], starts: Sequence[Record]) -> list[Session]:
    """Which iterations were done since which start.

    Args:
        training: training records. What they say of tokens counts from the beginning of the model,
            so it goes on from what was loaded, and not from the record before, at each start.
        starts: of starts.jsonl; those without an iteration are left out.
    """
    found: list[Session] = []
    began = {start["iteration"]: start for start in starts}
    tokens = 0
    for record in training:
        start = began.get(record["iteration"] - 1)
        if start is not None or not found:
            start = start or {"iteration": record["iteration"] - 1}
            tokens = start.get("tokens", tokens)
            found.append(Session(start, []))
        found[-1].iterations.append((record, record["tokens"] - tokens))
        tokens = record["tokens"]
    return found
