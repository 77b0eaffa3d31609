"""What a training with megatron.training gets from this project, whoever wrote the script."""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from megatron.training import get_args

from megatron_dion.checkpointing.folders import Choice
from megatron_dion.megatron import checkpoints, environment, patches, validation
from megatron_dion.megatron.diagnostics import log_diagnostics
from megatron_dion.megatron.errors import ConfigurationError, in_one_line, refuse
from megatron_dion.megatron.flags import (
    DionOptions,
    default_arguments,
    dion_options,
    extra_args_provider,
)
from megatron_dion.megatron.progress import describe_processes, say
from megatron_dion.megatron.recorder import Recorder
from megatron_dion.megatron.run_directory import replace_file, write_config

Stock = patches.Stock
ParserHook = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


class Join:
    """The join of a process with megatron.training.

    Args:
        device: `cuda` or `cpu`; Megatron must have been prepared for it.
        script_is_ours: whether `megatron_dion.megatron.data` reads the data. In another script,
            runs that have nothing to do with Dion are left to Megatron but for the flags.
    """

    def __init__(self, device: str, script_is_ours: bool) -> None:
        self._device = device
        self._script_is_ours = script_is_ours
        self._args_of_choice: argparse.Namespace | None = None
        self._choice: Choice | None = None
        self._options = DionOptions()
        self._has_begun = False

    def install(self) -> None:
        """Stand between a script and the functions of megatron.training that it will call."""
        patches.wrap("parse_args", self._parse)
        patches.wrap("load_args_from_checkpoint", self._load_args)
        patches.wrap("validate_args", self._validate)
        patches.wrap("pretrain", self._pretrain)
        patches.wrap("get_megatron_optimizer", self._build)
        patches.use_packaged_dataset_helpers()

    def _parse(
        self, stock: Stock, extra_args: ParserHook | None = None, ignore_unknown_args: bool = False
    ) -> argparse.Namespace:
        """As megatron.training.arguments.parse_args, with our flags beside the script's own."""
        extend = extra_args_provider(self._device)
        args: argparse.Namespace = stock(
            lambda parser: extend(extra_args(parser) if extra_args else parser), ignore_unknown_args
        )
        refuse(
            "--yaml-cfg replaces the command line, and with it megatron-dion's flags: give "
            "Megatron's flags on the command line",
            when=args.yaml_cfg is not None,
        )
        args.device = self._device
        return args

    def _load_args(self, stock: Stock, args: argparse.Namespace, *more: Any, **options: Any) -> Any:
        """As megatron.training.checkpointing.load_args_from_checkpoint."""
        self._choose_checkpoint(args)
        if not self._cares_for(args):
            return stock(args, *more, **options)
        with checkpoints.explained(self._choice.folder if self._choice else Path(args.load or ".")):
            return stock(args, *more, **options)

    def _validate(
        self, stock: Stock, args: argparse.Namespace, defaults: dict[str, Any] | None = None
    ) -> Any:
        """As megatron.training.arguments.validate_args, with our checks around it."""
        self._choose_checkpoint(args)
        given = {name: value for name, value in vars(args).items() if value is not None}
        checked = argparse.Namespace(**{**vars(args), **(defaults or {}), **given})
        checks = validation.OF_ALL_SCRIPTS if self._cares_for(args) else validation.OF_OUR_FLAGS
        for check in (*checks, *(validation.OF_DATA if self._script_is_ours else ())):
            check(checked)
        self._options = dion_options(args)
        if not self._cares_for(args):
            return stock(args, defaults or {})
        return validate_as_megatron(args, lambda: stock(args, defaults or {}))

    def _cares_for(self, args: argparse.Namespace) -> bool:
        return self._script_is_ours or args.optimizer == "dion" or args.switch_optimizer

    def _choose_checkpoint(self, args: argparse.Namespace) -> None:
        """Once for each namespace: choosing changes it, and scripts may parse more than once."""
        if self._cares_for(args) and self._args_of_choice is not args:
            self._args_of_choice = args
            validation.check_checkpoint_flags(args)
            self._choice = checkpoints.choose(args)

    def _pretrain(self, stock: Stock, config: Any, *others: Any, **options: Any) -> Any:
        """As megatron.training.pretrain."""
        refuse("pretrain is called a second time in this process", when=self._has_begun)
        self._has_begun = True
        args = get_args()
        if args.world_size == 1:
            environment.describe_single_process()
        _prepare_folders(args)
        call = inspect.signature(stock).bind(config, *others, **options)
        if args.optimizer == "dion":
            if config.model is not None:
                config.model.pre_wrap_hooks.append(self._tag)
            provider = call.arguments.get("model_provider")  # given by position or by name
            if provider is not None:
                call.arguments["model_provider"] = _hooked(provider, self._tag)
        if self._cares_for(args):
            checkpoints.use(self._choice, args)
        with self._recording(args):
            return stock(*call.args, **call.kwargs)

    def _tag(self, model_chunks: Any) -> Any:
        """Marks the matrices of a model, before mixed precision and DDP wrap it."""
        from megatron_dion.optimizer.routing import tag_matrices

        with in_one_line("the model does not fit --dion-split, --dion-include"):
            return tag_matrices(model_chunks, self._options.rules)

    def _build(self, stock: Stock, config: Any, model_chunks: Any, **others: Any) -> Any:
        """As megatron.training.training.get_megatron_optimizer."""
        from megatron_dion.optimizer.factory import get_megatron_dion_optimizer

        if config.optimizer != "dion":
            return stock(config, model_chunks, **others)
        refuse(
            "--dump-param-to-param-group-map is not supported by --optimizer dion: leave it out",
            when=others.pop("dump_param_to_param_group_map", None) is not None,
        )
        args, options = get_args(), self._options
        with in_one_line("Dion refuses this run"):
            optimizer = get_megatron_dion_optimizer(
                config,
                model_chunks,
                options.config,
                scalar_optimizer=options.scalar_optimizer,
                scalar_lr_mult=options.scalar_lr_mult,
                compressed_sync=options.compressed_sync,
                recenter_interval=options.recenter_interval,
                **others,
            )
        table = optimizer.routing_table
        with in_one_line("--dion-include, --dion-exclude"):
            options.rules.check_patterns(route.parameter for route in table.routes)
        if args.rank == 0:
            say(table.summary())
            if args.run_dir is not None:
                replace_file(Path(args.run_dir) / "routing.tsv", table.to_tsv())
        return optimizer

    @contextmanager
    def _recording(self, args: argparse.Namespace) -> Iterator[None]:
        """Follow the run on the last rank, which is on the last pipeline stage, with the loss."""
        is_wanted = self._cares_for(args) or args.run_dir is not None
        recorder = Recorder(args) if is_wanted and args.rank == args.world_size - 1 else None
        if recorder is not None:
            recorder.listen()
        if self._options.log_interval is not None:
            record = recorder.write_diagnostics if recorder else lambda snapshot: None
            log_diagnostics(self._options.log_interval, record)
        try:
            yield
        finally:
            if recorder is not None:
                recorder.close()


def validate_as_megatron(
    args: argparse.Namespace, validate: Callable[[], argparse.Namespace]
) -> argparse.Namespace:
    """Megatron's validation of a run that we care for, with its objections in one line."""
    with in_one_line("megatron refuses these arguments"):
        args = validate()
    if args.optimizer == "dion":
        validation.restore_distributed_optimizer(args)
    if args.fp8_param_gather:
        # Where no optimizer state is loaded, masters come from the checkpoint's weights. Megatron
        # takes the model's (training/checkpointing.py:2613), which are rounded to FP8 by then.
        args.load_main_params_from_ckpt = True
    return args


def _prepare_folders(args: argparse.Namespace) -> None:
    """Here, and not when the first checkpoint is due: that would cost the training before it."""
    save = None if args.enable_msc else args.save  # the name of a place in an object store
    for flag, folder in (("--save", save), ("--run-dir", args.run_dir)):
        if folder is None or args.rank not in (0, args.world_size - 1):
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"{flag} {folder} cannot be made: {error.strerror}: give another folder"
            ) from error
        refuse(
            f"{flag} {folder} cannot be written to: give another folder",
            when=not os.access(folder, os.W_OK),
        )
    if args.rank == 0:
        say(describe_processes(args))
        if args.run_dir is not None:
            write_config(Path(args.run_dir), args, sys.argv[1:], default_arguments(args.device))


def _hooked(model_provider: Callable[..., Any], hook: Callable[[Any], Any]) -> Callable[..., Any]:
    """A model provider has no hooks; what it returns is one chunk."""

    @wraps(model_provider)
    def provide(*args: Any, **options: Any) -> Any:
        [chunk] = hook([model_provider(*args, **options)])
        return chunk

    return provide
