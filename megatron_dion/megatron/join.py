"""What a training with megatron.training gets from this project, whoever wrote the script.

Our own pretrain_gpt.py and the drop-in for others' scripts differ in one word (`script_is_ours`).
"""

import argparse
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from megatron.training import get_args

from megatron_dion.checkpointing.folders import Choice
from megatron_dion.megatron import checkpoints, environment, patches, validation
from megatron_dion.megatron.arguments import (
    default_arguments,
    describe_defaults,
    describe_processes,
    dion_config_from_args,
    extra_args_provider,
    routing_rules_from_args,
)
from megatron_dion.megatron.diagnostics import log_diagnostics
from megatron_dion.megatron.errors import ConfigurationError
from megatron_dion.megatron.recorder import LOSS_NAME, Recorder, RunFacts, say
from megatron_dion.megatron.run_directory import write_config, write_routing
from megatron_dion.optimizer.diagnostics import Snapshot
from megatron_dion.sharding import Planner
from megatron_dion_tools.plan.loads import describe, loads

_SIZES = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
)

Hook = Callable[[Any], Any]


@contextmanager
def in_one_line(context: str) -> Iterator[None]:
    """Turns what a library objects, which would be a traceback on every rank, into our error."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        message = " ".join(str(error).split()) or line  # many assertions have no message
        raise ConfigurationError(f"{context}: {message}") from error


def megatron_in_one_line() -> AbstractContextManager[None]:
    """As `in_one_line`, around Megatron's checks of the command line."""
    return in_one_line("megatron refuses these arguments")


class Join:
    """The join of a process with megatron.training.

    Args:
        device: `cuda` or `cpu`; Megatron must have been prepared for it.
        script_is_ours: whether the data are read by `megatron_dion.megatron.data`. In another's
            script, runs that have nothing to do with Dion are left to Megatron but for the flags.
    """

    def __init__(self, device: str, script_is_ours: bool) -> None:
        self._device = device
        self._script_is_ours = script_is_ours
        self._chosen_for: argparse.Namespace | None = None
        self._choice: Choice | None = None
        self._has_begun = False

    def install(self) -> None:
        """Stand between a script and the functions of megatron.training that it will call."""
        patches.parse_args_with(self._parse)
        patches.load_args_with(self._load_args)
        patches.validate_args_with(self._validate)
        patches.pretrain_with(self._pretrain)
        patches.build_optimizer_with({"dion": self._build})
        patches.use_packaged_dataset_helpers()
        patches.give_fault_tolerance_the_parsed_arguments()

    def _cares_for(self, args: argparse.Namespace) -> bool:
        return self._script_is_ours or args.optimizer == "dion" or args.switch_optimizer

    # --- arguments

    def _parse(
        self,
        stock: Callable[..., argparse.Namespace],
        extra_args: Hook | None = None,
        ignore_unknown_args: bool = False,
    ) -> argparse.Namespace:
        """As megatron.training.arguments.parse_args, with our flags beside the script's own."""
        ours = extra_args_provider(self._device)

        def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            return ours(parser if extra_args is None else extra_args(parser))

        args = stock(extend, ignore_unknown_args)
        if not hasattr(args, "dion_split"):
            raise ConfigurationError(
                "--yaml-cfg replaces the command line, and with it megatron-dion's flags: give "
                "Megatron's flags on the command line"
            )
        args.device = self._device
        return args

    def _load_args(
        self, stock: Callable[..., Any], args: argparse.Namespace, *others: Any, **options: Any
    ) -> Any:
        """As megatron.training.checkpointing.load_args_from_checkpoint."""
        self._choose_checkpoint(args)
        if not self._cares_for(args):
            return stock(args, *others, **options)
        folder = args.load if self._choice is None else self._choice.folder
        with checkpoints.explained(Path(folder or ".")):
            return stock(args, *others, **options)

    def _validate(
        self,
        stock: Callable[..., argparse.Namespace],
        args: argparse.Namespace,
        defaults: dict[str, Any] | None = None,
    ) -> argparse.Namespace:
        """As megatron.training.arguments.validate_args, with our checks around it."""
        self._choose_checkpoint(args)
        given = {name: value for name, value in vars(args).items() if value is not None}
        checked = argparse.Namespace(**{**vars(args), **(defaults or {}), **given})
        for check in self._checks(args):
            check(checked)
        if args.fp8_emulation:
            # The config of the model, which the script makes next, asks for Transformer Engine.
            from megatron_dion.platforms.fp8 import emulation

            emulation.install()
        if not self._cares_for(args):
            return stock(args, defaults or {})
        return validate_as_megatron(args, lambda: stock(args, defaults or {}))

    def _checks(self, args: argparse.Namespace) -> Sequence[validation.Check]:
        if self._script_is_ours:
            return validation.CHECKS
        if self._cares_for(args):
            return validation.OF_ALL_SCRIPTS
        return validation.OF_OUR_FLAGS

    def _choose_checkpoint(self, args: argparse.Namespace) -> None:
        """Once for each namespace: choosing changes it, and scripts may parse more than once."""
        if self._cares_for(args) and self._chosen_for is not args:
            self._chosen_for = args
            self._choice = checkpoints.choose(args)

    # --- training

    def _pretrain(
        self, stock: Callable[..., Any], config: Any, *others: Any, **options: Any
    ) -> Any:
        """As megatron.training.pretrain."""
        if self._has_begun:
            raise ConfigurationError("pretrain is called a second time in this process")
        self._has_begun = True
        args = get_args()
        if "RANK" not in os.environ and args.world_size == 1:
            environment.describe_single_process()
        if not args.enable_msc:
            _make_folder("--save", args.save)
        if args.rank in (0, args.world_size - 1):
            _make_folder("--run-dir", args.run_dir)
        if args.rank == 0:
            _announce(args)
        hook = _composed(_model_hooks(args))
        if config.model is not None:
            config.model.pre_wrap_hooks.append(hook)
        call = inspect.signature(stock).bind(config, *others, **options)
        if call.arguments.get("model_provider") is not None:  # by position or by name
            call.arguments["model_provider"] = _hooked(call.arguments["model_provider"], hook)
        if self._cares_for(args):
            checkpoints.use(self._choice, args)
        with self._recording(args):
            return stock(*call.args, **call.kwargs)

    def _build(self, config: Any, model_chunks: Any, **options: Any) -> Any:
        from megatron_dion.optimizer.factory import get_megatron_dion_optimizer

        args = get_args()
        with in_one_line("Dion refuses this run"):
            optimizer = get_megatron_dion_optimizer(
                config,
                model_chunks,
                dion_config_from_args(args),
                scalar_optimizer=args.dion_scalar_optimizer,
                scalar_lr_mult=args.dion_scalar_lr_mult,
                compressed_sync=args.dion_compressed_sync,
                recenter_interval=args.dion_recenter_interval,
                **options,
            )
        with in_one_line("--dion-include, --dion-exclude"):
            routes = optimizer.routing_table.routes
            routing_rules_from_args(args).check_patterns(route.parameter for route in routes)
        if args.rank == 0:
            _publish_routing(args, optimizer.routing_table)
            if args.dion_print_plan:
                _print_plans(optimizer.planners())
        return optimizer

    @contextmanager
    def _recording(self, args: argparse.Namespace) -> Iterator[None]:
        """Follow the run on the last rank, which is on the last pipeline stage, with the loss."""
        is_wanted = self._cares_for(args) or args.run_dir is not None
        if args.rank != args.world_size - 1 or not is_wanted:
            _diagnose(args, lambda snapshot: None)
            yield
            return
        recorder = Recorder(_run_facts(args))
        recorder.listen()
        _diagnose(args, recorder.write_diagnostics)
        try:
            yield
        finally:
            recorder.close()


def validate_as_megatron(
    args: argparse.Namespace, validate: Callable[[], argparse.Namespace]
) -> argparse.Namespace:
    """Megatron's validation of a run that we care for, with its mistakes in one line."""
    with megatron_in_one_line():
        args = validate()
    if args.optimizer == "dion":
        validation.keep_distributed_optimizer(args)
    validation.keep_masters_of_fp8_weights(args)
    return args


def _make_folder(flag: str, folder: str | None) -> None:
    """Here, and not when the first checkpoint is due: that would cost the training before it."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{flag} {folder} cannot be made: {error.strerror}: give another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(f"{flag} {folder} cannot be written to: give another folder")


def _announce(args: argparse.Namespace) -> None:
    say(describe_processes(args))
    defaults = describe_defaults(args)
    if defaults:
        say(defaults)
    if args.run_dir is not None:
        write_config(Path(args.run_dir), args, sys.argv[1:], default_arguments(args.device))


def _model_hooks(args: argparse.Namespace) -> list[Hook]:
    """What happens to a model's chunks before mixed precision and DDP wrap them."""
    hooks: list[Hook] = []
    if args.fp8_emulation:
        hooks.append(_emulate_fp8)
    if args.optimizer == "dion":
        hooks.append(_tagging(args))
    return hooks


def _emulate_fp8(model_chunks: Any) -> Any:
    from megatron_dion.platforms.fp8 import emulation

    with in_one_line("--fp8-emulation"):
        return emulation.emulate_fp8(model_chunks)


def _tagging(args: argparse.Namespace) -> Hook:
    from megatron_dion.optimizer.routing import tag_matrices

    rules = routing_rules_from_args(args)

    def tag(model_chunks: Any) -> Any:
        with in_one_line("the model does not fit --dion-split, --dion-include"):
            return tag_matrices(model_chunks, rules)

    return tag


def _composed(hooks: Sequence[Hook]) -> Hook:
    def apply(model_chunks: Any) -> Any:
        for hook in hooks:
            model_chunks = hook(model_chunks)
        return model_chunks

    return apply


def _hooked(model_provider: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """A model provider has no hooks; what it returns is one chunk."""

    @wraps(model_provider)
    def provide(*args: Any, **options: Any) -> Any:
        [chunk] = hook([model_provider(*args, **options)])
        return chunk

    return provide


def _publish_routing(args: argparse.Namespace, routing_table: Any) -> None:
    for line in routing_table.summary().splitlines():
        say(line)
    if args.run_dir is not None:
        write_routing(Path(args.run_dir), routing_table.to_tsv())


def _print_plans(planners: list[Planner]) -> None:
    for planner in planners:
        matrices = len(planner.layout.matrices)
        say(f"plan of Dion's step: {matrices} matrices of the first pipeline stage")
        for line in describe(loads(planner)).splitlines():
            say(line)


def _diagnose(args: argparse.Namespace, record: Callable[[Snapshot], None]) -> None:
    if args.dion_log_interval is not None:
        log_diagnostics(args.dion_log_interval, record)


def _run_facts(args: argparse.Namespace) -> RunFacts:
    return RunFacts(
        run_dir=None if args.run_dir is None else Path(args.run_dir),
        train_iters=lambda: get_args().train_iters,
        log_interval=args.log_interval,
        loss_name=LOSS_NAME,
        # A checkpoint replaces the counter, so it has to be read where megatron keeps it.
        tokens_so_far=lambda: get_args().consumed_train_samples * args.seq_length,
        unigram_entropy=validation.unigram_entropy(args),
        sizes={name: getattr(args, name) for name in _SIZES},
    )
