"""The one place where functions of Megatron are replaced at run time.

Only functions that have no hook and no argument for what is needed. The module that calls a
function looks its name up in the namespace named here, so rebinding the name is enough. A run is
refused where the installed Megatron lacks a function, or a parameter that a wrapper relies on.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import megatron.training
from megatron.core import dist_checkpointing
from megatron.core.datasets import utils as dataset_utils
from megatron.training import arguments, checkpointing, training

from megatron_dion.megatron.errors import refuse

Stock = Callable[..., Any]

# Where each function is, and the parameters that its wrappers rely on.
_FUNCTIONS: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    # A script may hand parse_args a function that adds arguments, or none (arguments.py:116).
    "parse_args": (arguments, ("extra_args_provider", "ignore_unknown_args")),
    # What `--use-checkpoint-args` asks for (arguments.py:99).
    "load_args_from_checkpoint": (checkpointing, ("args",)),
    # Makes another optimizer of each whose name it does not know (arguments.py:1670).
    "validate_args": (arguments, ("args", "defaults")),
    # Has hooks on a model's config, and none on a model provider.
    "pretrain": (training, ("cfg_container", "model_provider")),
    # Knows a closed set of optimizers; training.py:2132 calls it by name.
    "get_megatron_optimizer": (training, ("config", "dump_param_to_param_group_map")),
    # Has no hook before and after (training.py:3856).
    "train_step": (training, ()),
    # Logs each iteration, but prints running means over the interval (training.py:3985).
    "training_log": (
        training,
        ("iteration", "loss_dict", "grad_norm", "learning_rate", "skipped_iter"),
    ),
    # Discards the losses, which `evaluate` returns without the iteration (training.py:4402).
    "evaluate_and_print_results": (training, ("prefix", "iteration")),
    "evaluate": (training, ()),
    # checkpointing.py:1577 and others believe the tracker, and end the process with exit code 0
    # where it is damaged.
    "read_metadata": (checkpointing, ("tracker_filename",)),
    # Loads without a look at whether the checkpoint fits the run (training.py:2199).
    "load_checkpoint": (training, ("ddp_model", "optimizer")),
    # Writes into the final folder, over what may be a complete checkpoint (checkpointing.py:826).
    "save": (
        dist_checkpointing,
        ("sharded_state_dict", "checkpoint_dir", "async_sharded_save", "verify_integrity"),
    ),
}


def wrap(name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by `wrapper(stock, ...)`, where `stock` is what it was before.

    Raises:
        ConfigurationError: the installed Megatron has another function of that name, or none.
    """
    module, needs = _FUNCTIONS[name]
    stock: Stock | None = getattr(module, name, None)
    parameters = inspect.signature(stock).parameters if stock else ()
    missing = [parameter for parameter in needs if parameter not in parameters]
    refuse(
        f"{module.__name__}.{name} has no {', '.join(missing) or 'definition'}: install the tested"
        " megatron-core",
        when=missing or stock is None,
    )
    assert stock is not None
    # wraps() keeps the signature, so that several wrappers may lie around one function.
    setattr(module, name, functools.wraps(stock)(functools.partial(wrapper, stock)))
    if name == "pretrain":
        megatron.training.pretrain = training.pretrain  # scripts import it from either module


def when_optimizer_is_built(observe: Callable[[Any], None]) -> None:
    """Call `observe` with the optimizer, of whatever kind, before its first use."""

    def build(stock: Stock, *args: Any, **options: Any) -> Any:
        optimizer = stock(*args, **options)
        observe(optimizer)
        return optimizer

    wrap("get_megatron_optimizer", build)


def around_train_step(run: Callable[[Callable[[], Any]], Any]) -> None:
    """Run each training step through `run(step)`."""
    wrap("train_step", lambda stock, *args, **more: run(functools.partial(stock, *args, **more)))


def after_each_iteration(observe: Callable[[dict[str, Any]], None]) -> None:
    """Call `observe` with the arguments of training_log, by name."""
    bind = inspect.signature(training.training_log).bind

    def log(stock: Stock, *args: Any, **options: Any) -> Any:
        observe(bind(*args, **options).arguments)
        return stock(*args, **options)

    wrap("training_log", log)


def after_each_evaluation(observe: Callable[[str, int, dict[str, Any]], None]) -> None:
    """Call `observe` with what is evaluated (`prefix`), the iteration, and the mean losses."""
    current: dict[str, Any] = {}
    bind = inspect.signature(training.evaluate_and_print_results).bind

    def remember(stock: Stock, *args: Any, **options: Any) -> Any:
        current.update(bind(*args, **options).arguments)
        return stock(*args, **options)

    def report(stock: Stock, *args: Any, **options: Any) -> Any:
        losses, *others = stock(*args, **options)
        if losses:
            observe(current["prefix"], current["iteration"], losses)
        return losses, *others

    wrap("evaluate_and_print_results", remember)
    wrap("evaluate", report)


def use_packaged_dataset_helpers() -> None:
    """Keep Megatron from compiling what the wheel brings compiled.

    core/datasets/utils.py:25 runs make where the wheel brings no Makefile, and exits. A checkout of
    Megatron-LM has one, and perhaps nothing compiled.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None
