"""Weights kept in FP8 on CPU, to test Dion with Megatron's own buffers and optimizer for them.

`scaling` has the arithmetic of Transformer Engine, `weights` what takes the place of Transformer
Engine in Megatron for two recipes, `checks` compares what each rank has with whole weights. A
product computes with the values of the FP8 weights; the other operands are not rounded.
"""
