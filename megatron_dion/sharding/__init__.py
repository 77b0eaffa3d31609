"""Where the rows of logical matrices live, and how the sums of a step cross ranks."""
