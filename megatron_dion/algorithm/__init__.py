"""The mathematics of Dion on tensors. Imports torch only; knows no processes and no Megatron."""
