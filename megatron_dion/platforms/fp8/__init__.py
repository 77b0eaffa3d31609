"""Emulation of FP8 training on CPU: the numerics of Transformer Engine, not its speed.

`scaling` has the arithmetic, `operands` what the recipes do to an operand of a product, `linear`
the three products of a linear layer, `weights` parameters that are kept in FP8, and `emulation`
joins them to Megatron's models and buffers.
"""
