"""The one place where functions of Megatron are replaced at run time.

Only functions that have no hook and no argument for what is needed. Who calls a function looks its
name up in the module or class named here, so rebinding the name is enough.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import megatron.training
from megatron.core import dist_checkpointing
from megatron.core.datasets import utils as dataset_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.training import arguments, checkpointing, global_vars, training

Stock = Callable[..., Any]

_OWNERS = {
    # A script may hand parse_args a function that adds arguments, or none (arguments.py:116).
    "parse_args": arguments,
    # Reads the arguments of the checkpoint that the tracker names, before validation.
    "load_args_from_checkpoint": checkpointing,
    # Raises whatever a tokenizer's library raises, and nobody catches it (global_vars.py:200).
    "build_tokenizer": global_vars,
    # Makes another optimizer of each whose name it does not know (arguments.py:1670).
    "validate_args": arguments,
    # Has hooks on a model's config, and none on a model provider.
    "pretrain": training,
    # Takes one size of buckets for all buffers (training.py:1850).
    "_compute_per_buffer_param_layout": DistributedOptimizer,
    # Loads, and has no hook after it (training.py:1228).
    "setup_model_and_optimizer": training,
    # Knows a closed set of optimizers; training.py:2132 calls it by name.
    "get_megatron_optimizer": training,
    # Has no hook before and after (training.py:3856).
    "train_step": training,
    # Logs each iteration, but prints running means over the interval (training.py:3985).
    "training_log": training,
    # Discards the losses, which `evaluate` returns without the iteration (training.py:4402).
    "evaluate_and_print_results": training,
    "evaluate": training,
    # checkpointing.py:1577 and others believe the tracker, and end the process with exit code 0
    # where it is damaged.
    "read_metadata": checkpointing,
    # Loads without a look at whether the checkpoint fits the run (training.py:2199).
    "load_checkpoint": training,
    # Writes into the final folder, over what may be a complete checkpoint (checkpointing.py:826).
    "save": dist_checkpointing,
}


def wrap(name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by `wrapper(stock, ...)`, where `stock` is what it was before."""
    owner = _OWNERS[name]
    stock: Stock = getattr(owner, name)
    # wraps() keeps the signature, so that several wrappers may lie around one function.
    setattr(owner, name, functools.wraps(stock)(functools.partial(wrapper, stock)))
    if name == "pretrain":
        megatron.training.pretrain = training.pretrain  # scripts import it from either module


def use_packaged_dataset_helpers() -> None:
    """Keep Megatron from compiling what the wheel brings compiled.

    core/datasets/utils.py:25 runs make where the wheel brings no Makefile, and exits. A checkout of
    Megatron-LM has one, and perhaps nothing compiled.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None
