"""A page about a run, from the files of its run directory."""
