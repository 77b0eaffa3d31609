"""Ranks and training runs on this machine, forked from one process that has imported Megatron."""
