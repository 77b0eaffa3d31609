"""What goes wrong that a person can mend."""


class ConvergenceError(Exception):
    """A case, a golden file or a run is not what it has to be; says which, and what to do."""
