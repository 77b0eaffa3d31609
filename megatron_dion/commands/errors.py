"""Mistakes of the user of a command."""


class ToolError(Exception):
    """A mistake in what the user gave, told in one line."""
