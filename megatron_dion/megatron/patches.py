"""The one place where functions of Megatron are replaced at run time.

Only functions that have no hook and no argument for what is needed. The module that calls a
function looks its name up in the namespace named here, so rebinding the name is enough. Each patch
names the line of Megatron that forces it, and the parameters that it relies on; where the installed
Megatron lacks one of them, the run is refused.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import megatron.training
from megatron.core import dist_checkpointing
from megatron.core.datasets import utils as dataset_utils
from megatron.training import arguments, checkpointing, ft_integration, get_args, training

from megatron_dion.megatron.errors import ConfigurationError, refuse

Stock = Callable[..., Any]


def parse_args_with(parse: Callable[..., Any]) -> None:
    """Parse every command line through `parse(stock, ...)`.

    A script may hand parse_args a function that adds arguments, or none (arguments.py:116).
    """
    _rebind(arguments, "parse_args", parse, "extra_args_provider", "ignore_unknown_args")


def load_args_with(load: Callable[..., Any]) -> None:
    """Do what `--use-checkpoint-args` asks for through `load(stock, ...)` (arguments.py:99)."""
    _rebind(checkpointing, "load_args_from_checkpoint", load, "args")


def validate_args_with(validate: Callable[..., Any]) -> None:
    """Validate arguments through `validate(stock, ...)` (arguments.py:107)."""
    _rebind(arguments, "validate_args", validate, "args", "defaults")


def pretrain_with(pretrain: Callable[..., Any]) -> None:
    """Train through `pretrain(stock, ...)`; scripts import it from either of two modules."""
    _rebind(training, "pretrain", pretrain, "cfg_container", "model_provider")
    megatron.training.pretrain = training.pretrain


def build_dion_with(build: Callable[..., Any]) -> None:
    """Build the optimizer of `--optimizer dion` through `build`, others through Megatron.

    training.py:2132 calls Megatron's factory by name, which knows a closed set of optimizers.

    Args:
        build: takes the parameters of `get_megatron_optimizer` up to `pg_collection`.
    """

    def dispatch(stock: Stock, config: Any, model_chunks: Any, **options: Any) -> Any:
        if config.optimizer != "dion":
            return stock(config, model_chunks, **options)
        if options.pop("dump_param_to_param_group_map", None) is not None:
            raise ConfigurationError(
                "--dump-param-to-param-group-map is not supported by --optimizer dion: leave it out"
            )
        return build(config, model_chunks, **options)

    _rebind(
        training,
        "get_megatron_optimizer",
        dispatch,
        *("config", "model_chunks", "dump_param_to_param_group_map"),
    )


def when_optimizer_is_built(observe: Callable[[Any], None]) -> None:
    """Call `observe` with the optimizer, of whatever kind, before its first use."""

    def build(stock: Stock, *args: Any, **options: Any) -> Any:
        optimizer = stock(*args, **options)
        observe(optimizer)
        return optimizer

    _rebind(training, "get_megatron_optimizer", build)


def around_train_step(wrap: Callable[[Callable[[], Any]], Any]) -> None:
    """Run each training step through `wrap(step)` (training.py:3856 calls it by name)."""

    def step(stock: Stock, *args: Any, **options: Any) -> Any:
        return wrap(functools.partial(stock, *args, **options))

    _rebind(training, "train_step", step)


def after_each_iteration(observe: Callable[[dict[str, Any]], None]) -> None:
    """Call `observe` with the arguments of training_log, by name.

    training.py:3985 logs every iteration, but prints and stores running means over the interval.
    """
    bind = inspect.signature(training.training_log).bind

    def log(stock: Stock, *args: Any, **options: Any) -> Any:
        observe(bind(*args, **options).arguments)
        return stock(*args, **options)

    needs = ("iteration", "loss_dict", "grad_norm", "learning_rate", "skipped_iter")
    _rebind(training, "training_log", log, *needs)


def after_each_evaluation(observe: Callable[[str, int, dict[str, Any]], None]) -> None:
    """Call `observe` with what is evaluated (`prefix`), the iteration, and the mean losses.

    evaluate_and_print_results knows the first two and discards the losses (training.py:4402), which
    evaluate returns.
    """
    current: dict[str, Any] = {}
    bind = inspect.signature(training.evaluate_and_print_results).bind

    def remember(stock: Stock, *args: Any, **options: Any) -> Any:
        current.update(bind(*args, **options).arguments)
        return stock(*args, **options)

    def report(stock: Stock, *args: Any, **options: Any) -> Any:
        losses, other_data, out_of_time = stock(*args, **options)
        if losses:
            observe(current["prefix"], current["iteration"], losses)
        return losses, other_data, out_of_time

    _rebind(training, "evaluate_and_print_results", remember, "prefix", "iteration")
    _rebind(training, "evaluate", report)


def read_tracker_with(read: Callable[[str], tuple[int, bool] | None]) -> None:
    """Let `read(tracker)` say iteration and whether it is a release; None leaves it to Megatron.

    checkpointing.py:1577 and others believe the tracker, and end the process with exit code 0 where
    it is damaged.
    """

    def read_metadata(stock: Stock, tracker_filename: str) -> Any:
        return read(tracker_filename) or stock(tracker_filename)

    _rebind(checkpointing, "read_metadata", read_metadata, "tracker_filename")


def load_checkpoint_with(load: Callable[..., Any]) -> None:
    """Load through `load(stock, ...)` (training.py:2199), which looks at the checkpoint first."""
    _rebind(training, "load_checkpoint", load, "ddp_model", "optimizer")


def save_checkpoint_with(save: Callable[..., Any]) -> None:
    """Save through `save(stock, ...)` (checkpointing.py:826).

    Megatron writes into the final folder, over what may be a complete checkpoint.
    """
    needs = ("sharded_state_dict", "checkpoint_dir", "async_sharded_save", "async_strategy")
    _rebind(dist_checkpointing, "save", save, *needs, "verify_integrity")


def use_packaged_dataset_helpers() -> None:
    """Keep Megatron from compiling what the wheel brings compiled.

    core/datasets/utils.py:25 runs make where the wheel brings no Makefile, and exits. A checkout of
    Megatron-LM has one, and perhaps nothing compiled.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None


def give_fault_tolerance_the_parsed_arguments() -> None:
    """Keep Megatron from parsing the command line a second time, without the project's flags.

    ft_integration.py:78 calls its own parser, before anything else in pretrain.
    """
    ft_integration.arguments = SimpleNamespace(parse_args=lambda ignore_unknown_args: get_args())


def _rebind(module: ModuleType, name: str, wrapper: Callable[..., Any], *needs: str) -> None:
    """Replace module.<name> by wrapper(<what it was>, ...); refuse one without what it needs."""
    current: Stock | None = getattr(module, name, None)
    parameters = inspect.signature(current).parameters if current else ()
    missing = [parameter for parameter in needs if parameter not in parameters]
    refuse(
        f"{module.__name__}.{name} has no {', '.join(missing) or 'definition'}: install the tested"
        " megatron-core",
        when=missing or current is None,
    )
    assert current is not None
    # wraps() keeps the signature, so that several wrappers may lie around one function.
    setattr(module, name, functools.wraps(current)(functools.partial(wrapper, current)))
