"""Steps from a text corpus to Megatron's datasets."""
