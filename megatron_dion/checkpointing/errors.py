"""What goes wrong with checkpoints, in one line."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(Exception):
    """A checkpoint cannot be used as the command line asks; the message says what to do."""


class NothingToLoad(CheckpointError):
    """A folder holds no complete checkpoint."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; older checkpoints are as they were."""


def one_line(error: BaseException) -> str:
    """The message of an error in one line, without the tracebacks that torch puts into some."""
    failures = getattr(error, "failures", None)  # by rank, in torch's CheckpointException
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {one_line(cause)}"
    if failures is not None:
        return "another rank failed"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and not error.args and frames:
        return str(frames[-1].line)  # many assertions have no message
    return " ".join(str(error).split())[:500] or type(error).__name__


@contextmanager
def in_one_line(
    kind: type[Exception], context: str, *causes: type[BaseException]
) -> Iterator[None]:
    """Turns exceptions of a library, `causes`, into an error of ours that says it in one line."""
    try:
        yield
    except causes as error:
        raise kind(f"{context}: {one_line(error)}") from error
