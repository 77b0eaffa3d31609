"""Programs that measure what a step of Dion costs; README.md says how to run and read them."""
