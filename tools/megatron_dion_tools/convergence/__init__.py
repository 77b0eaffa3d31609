"""Whether training converges as it did: cases, golden curves, checks and reports."""
