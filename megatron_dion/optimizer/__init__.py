"""Dion as an optimizer of torch and of Megatron-core, which some of the modules import."""
