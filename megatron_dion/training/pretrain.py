"""Puts a GPT pretraining run together and hands it to megatron.training."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import get_tokenizer, set_global_variables

from megatron_dion.checkpointing.folders import Choice
from megatron_dion.diagnostics.records import Snapshot
from megatron_dion.planning.loads import describe, loads
from megatron_dion.sharding import Planner
from megatron_dion.training import checkpoints, patches, validation
from megatron_dion.training.arguments import (
    default_arguments,
    describe_defaults,
    dion_config_from_args,
    extra_args_provider,
    routing_rules_from_args,
)
from megatron_dion.training.data import LOSS_NAME, datasets_provider, forward_step
from megatron_dion.training.diagnostics import Diagnostics
from megatron_dion.training.errors import ConfigurationError
from megatron_dion.training.recorder import Recorder, RunFacts, say
from megatron_dion.training.run_directory import write_config, write_routing

_REFUSED = "megatron refuses these arguments"
_SIZES = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
)


def pretrain_gpt(argv: Sequence[str], device: str) -> None:
    """Train a GPT. Megatron must have been prepared for the device.

    Args:
        argv: Megatron's flags and the project's own.
        device: `cuda` or `cpu`.

    Raises:
        ConfigurationError: The run cannot start as it was asked for.
    """
    args, choice = resolve_arguments(argv, device)
    if args.rank == 0:
        _announce(args, argv)
    patches.use_packaged_dataset_helpers()
    patches.give_fault_tolerance_the_parsed_arguments()
    hooks = [_fp8_emulation()] if args.fp8_emulation else []
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    config.model.pre_wrap_hooks.extend(hooks)
    if args.optimizer == "dion":
        _join_dion(args, config.model)
    checkpoints.use(choice, args)
    with _recording(args):
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    torch.distributed.destroy_process_group()


def resolve_arguments(argv: Sequence[str], device: str) -> tuple[argparse.Namespace, Choice | None]:
    """Parse and check the command line, and make it megatron's global arguments.

    The same steps as megatron.training.arguments.parse_and_validate_args, with the project's own
    checks between them.

    Returns:
        The arguments, and the checkpoint that the run loads.

    Raises:
        ConfigurationError: The run cannot start as it was asked for.
    """
    args = _parsed(argv, device)
    choice = checkpoints.choose(args)
    checkpoints.load_arguments(args, choice)
    _validate(args, validation.CHECKS)
    with _in_one_line(_REFUSED):
        set_global_variables(args)
    validation.check_token_ids(args, get_tokenizer().vocab_size)
    return args, choice


def check_arguments(argv: Sequence[str], device: str, world_size: int) -> None:
    """All that can be known of a run before it starts, away from its machines and its files.

    Args:
        argv: Megatron's flags and the project's own.
        device: `cuda` or `cpu`.
        world_size: number of ranks of the run.

    Raises:
        ConfigurationError: the run would not start.
    """
    with mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": str(world_size)}):
        args = _parsed(argv, device)
    _validate(args, [check for check in validation.CHECKS if check not in validation.OF_FILES])
    with _in_one_line(_REFUSED):
        gpt_config_from_args(args)


def _parsed(argv: Sequence[str], device: str) -> argparse.Namespace:
    with mock.patch.object(sys, "argv", [sys.argv[0], *argv]):
        args = parse_args(extra_args_provider(device))
    args.device = device
    return args


def _validate(args: argparse.Namespace, checks: Sequence[validation.Check]) -> None:
    for check in checks:
        check(args)
    with _in_one_line(_REFUSED):
        validate_args(args)
    if args.optimizer == "dion":
        validation.keep_distributed_optimizer(args)
    validation.keep_masters_of_fp8_weights(args)


@contextmanager
def _in_one_line(context: str) -> Iterator[None]:
    """Turns what a library objects, which would be a traceback on every rank, into our error."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        message = " ".join(str(error).split()) or line  # many assertions have no message
        raise ConfigurationError(f"{context}: {message}") from error


def _announce(args: argparse.Namespace, argv: Sequence[str]) -> None:
    defaults = describe_defaults(args)
    if defaults:
        say(defaults)
    if args.run_dir is not None:
        write_config(Path(args.run_dir), args, argv, default_arguments(args.device))


def _fp8_emulation() -> Callable[[Any], Any]:
    """Installs it; the hook lets a model compute in FP8."""
    from megatron_dion.platforms.fp8 import emulation

    emulation.install()

    def emulate(model_chunks: Any) -> Any:
        with _in_one_line("--fp8-emulation"):
            return emulation.emulate_fp8(model_chunks)

    return emulate


def _join_dion(args: argparse.Namespace, model_config: Any) -> None:
    from megatron_dion.optimizer.factory import get_megatron_dion_optimizer
    from megatron_dion.optimizer.routing import tag_matrices

    rules = routing_rules_from_args(args)

    def build(config: Any, model_chunks: Any, **options: Any) -> Any:
        with _in_one_line("Dion refuses this run"):
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
        with _in_one_line("--dion-include, --dion-exclude"):
            rules.check_patterns(route.parameter for route in optimizer.routing_table.routes)
        if args.rank == 0:
            _publish_routing(args, optimizer.routing_table)
            if args.dion_print_plan:
                _print_plans(optimizer.planners())
        return optimizer

    def tag(model_chunks: Any) -> Any:
        with _in_one_line("the model does not fit --dion-split, --dion-include"):
            return tag_matrices(model_chunks, rules)

    model_config.pre_wrap_hooks.append(tag)
    patches.build_optimizer_with({"dion": build})


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


@contextmanager
def _recording(args: argparse.Namespace) -> Iterator[None]:
    """Follow the run on the last rank, which is on the last pipeline stage and knows the loss."""
    if args.rank != args.world_size - 1:
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


def _diagnose(args: argparse.Namespace, record: Callable[[Snapshot], None]) -> None:
    if args.dion_log_interval is not None:
        Diagnostics(args.dion_log_interval, record).listen()


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
