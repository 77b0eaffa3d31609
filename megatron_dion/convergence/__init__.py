"""Whether training converges as it did: cases, golden curves, checks, studies and reports."""
