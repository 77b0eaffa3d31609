"""Checkpoints on disk: which are complete, what they hold, how they are written and checked."""
