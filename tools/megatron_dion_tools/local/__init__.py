"""Worlds of ranks on this machine, forked from a process that has imported Megatron once."""
