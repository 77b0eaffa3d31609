"""Prepare data to train on: a text corpus, a tokenizer, Megatron's datasets."""

import argparse

from megatron_dion_tools.data import corpus, preprocess, tokenizer

STEPS = {
    "corpus": (corpus, "fetch the pinned text corpus"),
    "tokenizer": (tokenizer, "train a SentencePiece tokenizer"),
    "preprocess": (preprocess, "tokenize documents into Megatron's indexed datasets"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the steps and their flags."""
    steps = parser.add_subparsers(required=True, metavar="STEP")
    for name, (module, what) in STEPS.items():
        step = steps.add_parser(name, help=what, description=module.__doc__)
        module.add_arguments(step)
        step.set_defaults(step=module.run)


def run(args: argparse.Namespace) -> None:
    """Do the step that was asked for."""
    args.step(args)
