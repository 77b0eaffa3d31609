"""Puts Dion into a training with megatron.training, by hooks around the functions of a run."""

import argparse
import inspect
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from megatron.training import get_args
from torch.nn import Parameter

from megatron_dion.checkpointing.folders import Choice
from megatron_dion.megatron import checkpoints, patches, validation
from megatron_dion.megatron.data_checks import load_tokenizer
from megatron_dion.megatron.errors import in_one_line, refuse, say
from megatron_dion.megatron.flags import (
    ParserHook,
    dion_options,
    extend_parser,
    refuse_removed_flags,
)
from megatron_dion.megatron.patches import Stock
from megatron_dion.megatron.recorder import Recorder, log_diagnostics
from megatron_dion.megatron.run_directory import (
    CONFIG,
    METRICS,
    STARTS,
    read_metrics,
    replace_file,
    write_config,
)
from megatron_dion.optimizer.chain import DionChainedOptimizer
from megatron_dion.optimizer.factory import get_megatron_dion_optimizer
from megatron_dion.optimizer.options import DionOptions
from megatron_dion.optimizer.routing import tag_matrices, weight_of
from megatron_dion.platforms import describe_single_process
from megatron_dion.sharding.layout import dion_bucket_size


class TrainingHooks:
    """Hooks around the functions of megatron.training that a script calls, in the order of a run.

    The process must have been prepared for the device. If the script is not ours, the script may
    read its data in another way, and runs that have nothing to do with Dion are left to Megatron
    but for the flags.
    """

    def __init__(self, device: str, script_is_ours: bool) -> None:
        self._device = device
        self._script_is_ours = script_is_ours
        self._choice: Choice | None = None
        self._args_of_choice: argparse.Namespace | None = None
        self._options = DionOptions()
        self._defaults: dict[str, Any] = {}

    def install(self) -> None:
        """Stand between a script and the functions of megatron.training that it will call."""
        patches.wrap("parse_args", self._parse)
        patches.wrap("load_args_from_checkpoint", self._load_args)
        patches.wrap("validate_args", self._validate)
        if self._script_is_ours:
            patches.wrap("build_tokenizer", load_tokenizer)
        patches.wrap("pretrain", self._pretrain)
        patches.wrap("setup_model_and_optimizer", self._set_up)
        patches.wrap("get_megatron_optimizer", self._build)
        patches.wrap("_compute_per_buffer_param_layout", self._lay_out)
        patches.use_packaged_dataset_helpers()

    def _manages(self, args: argparse.Namespace) -> bool:
        """Whether a run gets more of this project than its flags."""
        return self._script_is_ours or args.optimizer == "dion" or args.switch_optimizer

    def _parse(
        self, stock: Stock, extra_args: ParserHook | None = None, ignore_unknown_args: bool = False
    ) -> argparse.Namespace:
        """As megatron.training.arguments.parse_args, with our flags beside the script's own."""

        def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = extend_parser(extra_args(parser) if extra_args else parser, self._device)
            for action in parser._actions:  # of a flag that is there twice, the first counts
                self._defaults.setdefault(action.dest, action.default)
            return parser

        refuse_removed_flags(sys.argv)
        args: argparse.Namespace = stock(extend, ignore_unknown_args)
        refuse("--yaml-cfg is not supported: give flags on the command line", when=args.yaml_cfg)
        args.device = self._device
        # A tokenizer will give the vocabulary a padding where the command line does not.
        args.padded_vocab_size_is_given = args.padded_vocab_size is not None
        return args

    def _choose_checkpoint(self, args: argparse.Namespace) -> None:
        """Chooses once for each namespace, which the choice changes; a script may make another."""
        if self._manages(args) and self._args_of_choice is not args:
            self._args_of_choice = args
            validation.check_checkpoint_flags(args)
            self._choice = checkpoints.choose(args)

    def _load_args(self, stock: Stock, args: argparse.Namespace, *more: Any, **options: Any) -> Any:
        """As megatron.training.checkpointing.load_args_from_checkpoint."""
        self._choose_checkpoint(args)
        with checkpoints.explained(self._choice.folder if self._choice else None):
            return stock(args, *more, **options)

    def _validate(
        self, stock: Stock, args: argparse.Namespace, defaults: dict[str, Any] | None = None
    ) -> Any:
        """As megatron.training.arguments.validate_args, with our checks around it."""
        for name, value in (defaults or {}).items():  # as Megatron does it
            if getattr(args, name, None) is None:
                setattr(args, name, value)
        self._choose_checkpoint(args)
        self._options = dion_options(args)
        validation.check_dion_flags(args, self._options)
        is_managed = self._manages(args)
        checks = validation.OF_ALL_SCRIPTS if is_managed else validation.OF_OUR_FLAGS
        for check in (*checks, *(validation.OF_DATA if self._script_is_ours else ())):
            check(args)
        if is_managed:
            return validate_as_megatron(args, lambda: stock(args, {}))
        return stock(args, {})

    def _pretrain(self, stock: Stock, config: Any, *others: Any, **options: Any) -> Any:
        """As megatron.training.pretrain."""
        args = get_args()
        describe_single_process()
        self._begin_folders(args)
        call = inspect.signature(stock).bind(config, *others, **options)
        if args.optimizer == "dion":
            if config.model is not None:
                config.model.pre_wrap_hooks.append(self._tag)
            provider = call.arguments.get("model_provider")  # given by position or by name
            if provider is not None:
                # It has no hooks; what it returns is one chunk.
                call.arguments["model_provider"] = wraps(provider)(
                    lambda *args, **options: self._tag([provider(*args, **options)])[0]
                )
        if self._manages(args):
            checkpoints.use(self._choice, args, self._options)
        record = None
        # The last rank is on the last pipeline stage, with the loss.
        if args.run_dir is not None and args.rank == args.world_size - 1:
            record = Recorder(Path(args.run_dir)).append
        if self._options.log_interval is not None:
            log_diagnostics(self._options.log_interval, record)
        return stock(*call.args, **call.kwargs)

    def _begin_folders(self, args: argparse.Namespace) -> None:
        """Makes the folders before the training, not when the first checkpoint is due."""
        for flag, folder in (("--save", args.save), ("--run-dir", args.run_dir)):
            is_ours = flag == "--run-dir" or not args.enable_msc
            if folder is None or not is_ours or args.rank not in (0, args.world_size - 1):
                continue
            with in_one_line(f"{flag} {folder} cannot be made"):
                Path(folder).mkdir(parents=True, exist_ok=True)
            refuse(f"{flag} {folder} cannot be written to", when=not os.access(folder, os.W_OK))
            for name in (METRICS, STARTS) if flag == "--run-dir" else ():
                with in_one_line(flag):
                    read_metrics(Path(folder) / name)
        if args.rank == 0:
            device = "CPU (no GPU is used)" if args.device == "cpu" else "CUDA"
            say(f"{args.world_size} processes on {device}")

    def _tag(self, model_chunks: Any) -> Any:
        """Marks the matrices of a model, before mixed precision and DDP wrap it."""
        with in_one_line("the model does not fit --dion-split, --dion-include"):
            return tag_matrices(model_chunks, self._options.rules)

    def _lay_out(self, stock: Stock, params: list[Parameter], size: int | None, *rest: Any) -> Any:
        """As DistributedOptimizer's; buckets of matrices have our size if the user gives none."""
        args = get_args() if size and weight_of(params[0]) else None
        if size and args and not (args.ddp_bucket_size or args.ddp_num_buckets):
            size = dion_bucket_size(sum(parameter.numel() for parameter in params), size)
            say(f"gradients of Dion's matrices: --ddp-bucket-size {size}, which cuts few of them")
        return stock(params, size, *rest)

    def _set_up(self, stock: Stock, *others: Any, **options: Any) -> Any:
        """As megatron.training.training's; a refused checkpoint leaves an earlier run's files."""
        model, optimizer, *more = stock(*others, **options)
        args = get_args()
        folder = Path(args.run_dir) if args.run_dir and args.rank == 0 else None
        is_over = args.skip_train or args.iteration >= args.train_iters
        # An evaluation says nothing new about the run that trained.
        if folder and not (is_over and (folder / CONFIG).exists()):
            write_config(folder, args, self._defaults)
            if isinstance(optimizer, DionChainedOptimizer):
                replace_file(folder / "routing.tsv", optimizer.routing_table.to_tsv())
        return model, optimizer, *more

    def _build(self, stock: Stock, config: Any, model_chunks: Any, **others: Any) -> Any:
        """As megatron.training.training.get_megatron_optimizer."""
        args = get_args()
        if self._manages(args):
            checkpoints.check_that_ranks_agree(self._choice)
        if config.optimizer != "dion":
            return stock(config, model_chunks, **others)
        others.pop("dump_param_to_param_group_map", None)  # which is refused
        with in_one_line("Dion refuses this run"):
            optimizer = get_megatron_dion_optimizer(config, model_chunks, self._options, **others)
        table = optimizer.routing_table
        with in_one_line("--dion-include, --dion-exclude"):
            self._options.rules.check_patterns(route.parameter for route in table.routes)
        if args.rank == 0:
            say(table.summary())
        return optimizer


def validate_as_megatron(
    args: argparse.Namespace, validate: Callable[[], argparse.Namespace]
) -> argparse.Namespace:
    """Megatron's validation of a run, with its objections in one line."""
    is_async = args.async_save
    # Its process asks CUDA for a device, dies without one, and the run waits for it for ever.
    refuse(
        "--use-persistent-ckpt-worker needs a GPU: leave out --async-save",
        when=is_async and args.use_persistent_ckpt_worker and args.device == "cpu",
    )
    with in_one_line("megatron refuses these arguments"):
        args = validate()
    refuse(
        "Megatron ignores --async-save without --use-persistent-ckpt-worker: add it, or leave both"
        " out",
        when=is_async and not args.async_save,
    )
    if args.optimizer == "dion":
        validation.restore_distributed_optimizer(args)
    if args.fp8_param_gather:
        # Where no optimizer state is loaded, masters come from the checkpoint's weights. Megatron
        # takes the model's (training/checkpointing.py:2613), which are rounded to FP8 by then.
        args.load_main_params_from_ckpt = True
    return args
