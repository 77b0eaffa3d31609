"""Puts a GPT pretraining run together and hands it to megatron.training."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from unittest import mock

import torch
from megatron.core.enums import ModelType
from megatron.training import arguments, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.global_vars import get_tokenizer

from megatron_dion.megatron import validation
from megatron_dion.megatron.data import datasets_provider, forward_step
from megatron_dion.megatron.data_checks import check_tokenizer
from megatron_dion.megatron.errors import in_one_line
from megatron_dion.megatron.flags import dion_options, extend_parser
from megatron_dion.megatron.hooks import TrainingHooks, validate_as_megatron

_REFUSED = "megatron refuses these arguments"


def pretrain_gpt(argv: Sequence[str], device: str) -> None:
    """Train a GPT as the flags say. Megatron must have been prepared for the device."""
    TrainingHooks(device, script_is_ours=True).install()
    # From here on as any script of Megatron-LM; names are looked up late, for what is patched.
    with mock.patch.object(sys, "argv", [sys.argv[0], *argv]):
        with in_one_line(_REFUSED):
            args = arguments.parse_and_validate_args()
        check_tokenizer(args, get_tokenizer())
        with in_one_line(_REFUSED):
            model = gpt_config_from_args(args)
        config = pretrain_cfg_container_from_args(args, model)
        try:
            training.pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
        except SystemExit as ending:  # of --exit-interval and its like
            if ending.code:
                raise
    # Without this call gloo's threads abort some processes at their exit.
    torch.distributed.destroy_process_group()


def check_arguments(argv: Sequence[str], device: str, world_size: int) -> None:
    """Raise the error with which a run would be refused, as far as another machine can tell."""
    world = {"RANK": "0", "WORLD_SIZE": str(world_size)}
    command_line = mock.patch.object(sys, "argv", [sys.argv[0], *argv])
    with mock.patch.dict(os.environ, world), command_line:
        args: argparse.Namespace = arguments.parse_args(partial(extend_parser, device=device))
    args.device = device
    validation.check_dion_flags(args, dion_options(args))
    for check in (*validation.OF_ALL_SCRIPTS, validation.check_data_mode):
        if check is not validation.check_packages:
            check(args)
    args = validate_as_megatron(args, lambda: arguments.validate_args(args))
    # As a rule the vocabulary's size is the tokenizer's, which is a file.
    args.vocab_size = args.vocab_size or 1
    with in_one_line(_REFUSED):
        gpt_config_from_args(args)
