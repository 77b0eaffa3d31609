"""What goes wrong with checkpoints, told in one line."""


class CheckpointError(Exception):
    """A checkpoint cannot be used as it was asked for; the message says what to do."""


class NothingToLoad(CheckpointError):
    """There is no complete checkpoint."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; what was there before is still there."""
