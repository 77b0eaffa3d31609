"""Dion in megatron.training: arguments, checks, patches, and what a run leaves behind."""

from megatron_dion.megatron.launch import main

__all__ = ["main"]
