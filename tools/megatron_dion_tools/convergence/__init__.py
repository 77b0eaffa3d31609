"""Does training converge as it did: cases with golden curves, comparisons of runs, and sweeps."""
