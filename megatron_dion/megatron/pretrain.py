"""Puts a GPT pretraining run together and hands it to megatron.training."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from unittest import mock

import torch
from megatron.core.enums import ModelType
from megatron.training import arguments, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.global_vars import get_tokenizer

from megatron_dion.megatron import validation
from megatron_dion.megatron.data import datasets_provider, forward_step
from megatron_dion.megatron.data_checks import check_token_ids
from megatron_dion.megatron.errors import in_one_line
from megatron_dion.megatron.flags import extra_args_provider
from megatron_dion.megatron.join import Join, validate_as_megatron


def pretrain_gpt(argv: Sequence[str], device: str) -> None:
    """Train a GPT. Megatron must have been prepared for the device.

    Args:
        argv: Megatron's flags and the project's own.
        device: `cuda` or `cpu`.

    Raises:
        ConfigurationError: The run cannot start as it was asked for.
    """
    Join(device, script_is_ours=True).install()
    # From here on as any script of Megatron-LM; names are looked up late, for what is patched.
    with _command_line(argv):
        with in_one_line("megatron refuses these arguments"):
            args = arguments.parse_and_validate_args()
        check_token_ids(args, get_tokenizer().vocab_size)
        with in_one_line("megatron refuses these arguments"):
            model = gpt_config_from_args(args)
        config = pretrain_cfg_container_from_args(args, model)
        training.pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    torch.distributed.destroy_process_group()


def check_arguments(argv: Sequence[str], device: str, world_size: int) -> None:
    """All that can be known of a run before it starts, away from its machines and its files.

    Args:
        argv: Megatron's flags and the project's own.
        device: `cuda` or `cpu`.
        world_size: number of ranks of the run.

    Raises:
        ConfigurationError: the run would not start.
    """
    world = {"RANK": "0", "WORLD_SIZE": str(world_size)}
    with mock.patch.dict(os.environ, world), _command_line(argv):
        args: argparse.Namespace = arguments.parse_args(extra_args_provider(device))
    args.device = device
    for check in (*validation.OF_ALL_SCRIPTS, validation.check_data_mode):
        if check is not validation.check_packages:
            check(args)
    args = validate_as_megatron(args, lambda: arguments.validate_args(args))
    # As a rule the vocabulary's size is the tokenizer's, which is a file.
    args.vocab_size = args.vocab_size or 1
    with in_one_line("megatron refuses these arguments"):
        gpt_config_from_args(args)


def _command_line(argv: Sequence[str]) -> AbstractContextManager[object]:
    return mock.patch.object(sys, "argv", [sys.argv[0], *argv])
