"""The iterations of a run, by the start of the run that did them."""

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
        """All iterations but the first, in which memory and connections are set up."""
        return self.iterations[1:]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.iterations)

    @property
    def tokens_per_second(self) -> float:
        """The throughput of settled iterations; of the only one, if there is one."""
        timed = self.settled or self.iterations
        return sum(tokens for _, tokens in timed) / sum(r["iteration_seconds"] for r, _ in timed)


def sessions(training: Sequence[Record], starts: Sequence[Record]) -> list[Session]:
    """Divides training records by the starts of the run.

    Args:
        training: training records; their tokens are counted from the beginning of the model, which
            a start may have loaded from another run.
        starts: the lines of starts.jsonl; a start without an iteration makes no session.
    """
    divided: list[Session] = []
    began = {start["iteration"]: start for start in starts}
    tokens = 0
    for record in training:
        start = began.get(record["iteration"] - 1)
        if start is not None or not divided:
            start = start or {"iteration": record["iteration"] - 1}
            tokens = start.get("tokens", tokens)
            divided.append(Session(start, []))
        divided[-1].iterations.append((record, record["tokens"] - tokens))
        tokens = record["tokens"]
    return divided
