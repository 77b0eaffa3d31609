"""Subcommands of `megatron-dion`; `megatron_dion.cli` has their table."""
