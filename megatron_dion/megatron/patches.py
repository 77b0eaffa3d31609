"""The one place where functions of Megatron are replaced at run time.

Only what has no other seam: neither a hook nor an argument. The module that calls a function looks
its name up in the namespace named here, so rebinding the name is enough.
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

from megatron_dion.megatron.errors import ConfigurationError

# Name and parameters of each function as of the tested version.
_TESTED_SIGNATURES: dict[str, tuple[str, ...]] = {
    "parse_args": ("extra_args_provider", "ignore_unknown_args"),
    "load_args_from_checkpoint": ("args", "load_arg", "checkpointing_context"),
    "validate_args": ("args", "defaults"),
    "pretrain": (
        "cfg_container",
        "train_valid_test_dataset_provider",
        "model_type",
        "forward_step_func",
        "model_provider",
        "process_non_loss_data_func",
        "get_embedding_ranks",
        "get_position_embedding_ranks",
        "non_loss_data_func",
        "store",
        "inprocess_call_wrapper",
        "p2p_communicator",
        "pg_collection",
        "skip_model_parallel_init",
    ),
    "get_megatron_optimizer": (
        "config",
        "model_chunks",
        "config_overrides",
        "use_gloo_process_groups",
        "pg_collection",
        "dump_param_to_param_group_map",
    ),
    "train_step": (
        "forward_step_func",
        "data_iterator",
        "model",
        "optimizer",
        "opt_param_scheduler",
        "config",
        "forward_backward_func",
        "iteration",
        "pg_collection",
        "p2p_communicator",
    ),
    "training_log": (
        "loss_dict",
        "total_loss_dict",
        "learning_rate",
        "iteration",
        "loss_scale",
        "report_memory_flag",
        "skipped_iter",
        "grad_norm",
        "params_norm",
        "num_zeros_in_grad",
        "max_attention_logit",
        "pg_collection",
        "is_first_iteration",
        "seqlen_squared_sum_in_batch",
        "total_real_tokens_in_batch",
    ),
    "evaluate": (
        "forward_step_func",
        "data_iterator",
        "model",
        "process_non_loss_data_func",
        "config",
        "verbose",
        "non_loss_data_func",
        "eval_iters",
        "pg_collection",
        "p2p_communicator",
    ),
    "evaluate_and_print_results": (
        "prefix",
        "forward_step_func",
        "data_iterator",
        "model",
        "iteration",
        "process_non_loss_data_func",
        "config",
        "verbose",
        "write_to_tensorboard",
        "non_loss_data_func",
        "pg_collection",
        "p2p_communicator",
    ),
    "load_checkpoint": (
        "ddp_model",
        "optimizer",
        "opt_param_scheduler",
        "load_arg",
        "strict",
        "checkpointing_context",
        "skip_load_to_model_and_opt",
        "tp_group",
        "pp_group",
        "dp_cp_group",
        "dp_group",
        "expt_dp_group",
        "rng_state_key_prefix",
    ),
    "read_metadata": ("tracker_filename",),
    "save": (
        "sharded_state_dict",
        "checkpoint_dir",
        "sharded_strategy",
        "validate_access_integrity",
        "async_sharded_save",
        "preprocess_common_before_consistancy_check",
        "content_metadata",
        "async_strategy",
        "verify_integrity",
    ),
}

OptimizerFactory = Callable[..., Any]


def parse_args_with(parse: Callable[..., Any]) -> None:
    """Parse every command line through `parse(stock, ...)`.

    A script may hand parse_args a function that adds arguments, or none (arguments.py:116).
    """
    _rebind("parse_args", parse, arguments)


def load_args_with(load: Callable[..., Any]) -> None:
    """Do what `--use-checkpoint-args` asks for through `load(stock, ...)` (arguments.py:99)."""
    _rebind("load_args_from_checkpoint", load, checkpointing)


def validate_args_with(validate: Callable[..., Any]) -> None:
    """Validate arguments through `validate(stock, ...)` (arguments.py:107)."""
    _rebind("validate_args", validate, arguments)


def pretrain_with(pretrain: Callable[..., Any]) -> None:
    """Train through `pretrain(stock, ...)`; scripts import it from either of two modules."""
    _rebind("pretrain", pretrain)
    megatron.training.pretrain = training.pretrain


def build_optimizer_with(factories: dict[str, OptimizerFactory]) -> None:
    """Let other factories build the optimizers of the given names; stock ones build the rest.

    training.py:2132 calls the stock factory by name, which knows a closed set of optimizers.

    Args:
        factories: From the value of `--optimizer` to a function with the parameters of
            `get_megatron_optimizer` up to `pg_collection`.
    """

    def dispatch(stock: OptimizerFactory, config: Any, model_chunks: Any, **options: Any) -> Any:
        factory = factories.get(config.optimizer)
        if factory is None:
            return stock(config, model_chunks, **options)
        if options.pop("dump_param_to_param_group_map", None) is not None:
            raise ConfigurationError(
                f"--dump-param-to-param-group-map is not supported by --optimizer "
                f"{config.optimizer}: leave it out"
            )
        return factory(config, model_chunks, **options)

    _rebind("get_megatron_optimizer", dispatch)


def when_optimizer_is_built(observe: Callable[[Any], None]) -> None:
    """Call `observe` with the optimizer, whichever it is, before it is used (training.py:2132)."""

    def build(factory: OptimizerFactory, *args: Any, **options: Any) -> Any:
        optimizer = factory(*args, **options)
        observe(optimizer)
        return optimizer

    _rebind("get_megatron_optimizer", build)


def around_train_step(wrap: Callable[[Callable[[], Any]], Any]) -> None:
    """Run each training step through `wrap(step)` (training.py:3856 calls it by name)."""

    def step(train_step: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return wrap(functools.partial(train_step, *args, **options))

    _rebind("train_step", step)


def after_each_iteration(observe: Callable[[dict[str, Any]], None]) -> None:
    """Call `observe` with the arguments of training_log, by name.

    training.py:3985 logs every iteration, but prints and stores running means over the interval.
    """
    bind = inspect.signature(training.training_log).bind

    def log(training_log: Callable[..., Any], *args: Any, **options: Any) -> Any:
        observe(bind(*args, **options).arguments)
        return training_log(*args, **options)

    _rebind("training_log", log)


def after_each_evaluation(observe: Callable[[str, int, dict[str, Any]], None]) -> None:
    """Call `observe` with what is evaluated (`prefix`), the iteration, and the mean losses.

    evaluate_and_print_results knows the first two and discards the losses (training.py:4402), which
    evaluate returns.
    """
    current: dict[str, Any] = {}
    bind = inspect.signature(training.evaluate_and_print_results).bind

    def remember(evaluate_and_print: Callable[..., Any], *args: Any, **options: Any) -> Any:
        arguments = bind(*args, **options).arguments
        current.update(prefix=arguments["prefix"], iteration=arguments["iteration"])
        return evaluate_and_print(*args, **options)

    def report(evaluate: Callable[..., Any], *args: Any, **options: Any) -> Any:
        losses, other_data, out_of_time = evaluate(*args, **options)
        if losses:
            observe(current["prefix"], current["iteration"], losses)
        return losses, other_data, out_of_time

    _rebind("evaluate_and_print_results", remember)
    _rebind("evaluate", report)


def read_tracker_with(read: Callable[[str], tuple[int, bool] | None]) -> None:
    """Let `read(tracker)` say iteration and whether it is a release; None leaves it to Megatron.

    checkpointing.py:1577 and others take the tracker's word for the newest checkpoint where there
    is a tracker, and end the process with exit code 0 where it is damaged.
    """

    def read_metadata(stock: Callable[..., Any], tracker_filename: str) -> tuple[int, bool]:
        answer: tuple[int, bool] = read(tracker_filename) or stock(tracker_filename)
        return answer

    _rebind("read_metadata", read_metadata, checkpointing)


def load_checkpoint_with(load: Callable[..., Any]) -> None:
    """Load through `load(stock, ...)` (training.py:2199), which looks at the checkpoint first."""
    _rebind("load_checkpoint", load)


def save_checkpoint_with(save: Callable[..., Any]) -> None:
    """Save through `save(stock, ...)` (checkpointing.py:826).

    The stock function writes into the final folder, over what may be a complete checkpoint.
    """
    _rebind("save", save, dist_checkpointing)


def use_packaged_dataset_helpers() -> None:
    """Keep megatron from compiling what the wheel brings compiled.

    core/datasets/utils.py:25 runs make where the wheel brings no Makefile, and exits. A checkout of
    Megatron-LM has one, and perhaps nothing compiled.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None


def give_fault_tolerance_the_parsed_arguments() -> None:
    """Keep megatron from parsing the command line a second time, without the project's flags.

    ft_integration.py:78 calls its own parser, before anything else in pretrain.
    """
    ft_integration.arguments = SimpleNamespace(parse_args=lambda ignore_unknown_args: get_args())


def _rebind(name: str, wrapper: Callable[..., Any], module: ModuleType = training) -> None:
    """Replace module.<name> by wrapper(<what it was>, ...)."""
    current: Callable[..., Any] = getattr(module, name)
    found = tuple(inspect.signature(current).parameters)
    if found != _TESTED_SIGNATURES[name]:
        raise ConfigurationError(
            f"{module.__name__}.{name} has parameters {found}, the tested version has "
            f"{_TESTED_SIGNATURES[name]}: install the tested megatron-core"
        )
    # wraps() keeps the signature, so that several wrappers may lie around one function.
    setattr(module, name, functools.wraps(current)(functools.partial(wrapper, current)))
