"""What goes wrong with checkpoints, told in one line."""


class CheckpointError(Exception):
    """A checkpoint cannot be used as it was asked for; the message says what to do."""


class NothingToLoad(CheckpointError):
    """There is no complete checkpoint."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; what was there before is still there."""


def told(error: BaseException) -> str:
    """What an error says, in one line, without the tracebacks that torch puts into some."""
    failures = getattr(error, "failures", None)  # by rank, of torch's CheckpointException
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {told(cause)}"
    if failures is not None:
        return "another rank failed"
    text = " ".join(str(error).split())
    return text[:500] or type(error).__name__
