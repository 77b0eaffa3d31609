"""What must be true, and be done, before megatron can be imported."""

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_dion.megatron.errors import refuse
from megatron_dion.platforms import cpu, resolve_device
from megatron_dion.platforms.ports import free_port

TESTED_MEGATRON_CORE = "0.19.2"


def check_megatron_version() -> None:
    """The join with Megatron rests on details of one version.

    Beside a script there may be a checkout of Megatron-LM, which is imported in place of what is
    installed. So the version is that of the files which an import would find.
    """
    found = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    fix = f"pip install megatron-core=={TESTED_MEGATRON_CORE}"
    refuse(f"megatron-core is not installed: {fix}", when=found is None)
    folder = Path(str(found and found.origin)).parent
    numbers = re.findall(r"(?:MAJOR|MINOR|PATCH) = (\d+)", (folder / "package_info.py").read_text())
    version = ".".join(numbers)
    refuse(
        f"{folder} is megatron-core {version}, tested is {TESTED_MEGATRON_CORE}: {fix}",
        when=version != TESTED_MEGATRON_CORE,
    )


def check_megatron_is_not_imported() -> None:
    """Names that a script has imported from megatron cannot be replaced in it any more."""
    refuse(
        "megatron has been imported already: call megatron_dion.install() before the first import "
        "of megatron, or start the script by `python -m megatron_dion.run`",
        when=sys.modules.keys() & {"megatron.core", "megatron.training"},
    )


def prepare(argv: Sequence[str]) -> str:
    """Do all that must happen before megatron is imported, on CPU together with its import.

    Of the command line, `--device` counts; returns `cuda` or `cpu`. A value that is neither is left
    to the full parser, which reports it with all other faults of the command line.
    """
    check_megatron_version()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    requested = parser.parse_known_args(argv)[0].device
    device = resolve_device(requested)
    refuse(
        "--device cuda: torch sees no CUDA device; use --device cpu",
        when=device == "cuda" and not torch.cuda.is_available(),
    )
    if device == "cpu":
        cpu.install(hide_gpus=requested == "cpu")
    return device


def describe_single_process() -> None:
    """Without a launcher, describe a world of one process as torchrun would."""
    if "RANK" not in os.environ:
        sizes = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(sizes, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
