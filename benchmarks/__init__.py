"""Programs that measure, one for each question: `python -m benchmarks.NAME`."""
