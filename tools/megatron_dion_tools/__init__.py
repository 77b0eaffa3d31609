"""The programs around a run: they import `megatron_dion`, which never imports them."""
