"""What must be true, and be done, before megatron can be imported."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_dion.megatron.errors import ConfigurationError, refuse
from megatron_dion.platforms import cpu, requested_device, resolve_device
from megatron_dion.platforms.ports import free_port

TESTED_MEGATRON_CORE = "0.19.2"


def check_megatron_version() -> None:
    """The join with Megatron rests on details of one version."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigurationError(
            f"megatron-core is not installed: pip install megatron-core=={TESTED_MEGATRON_CORE}"
        ) from error
    refuse(
        f"megatron-core {version} is installed, tested is {TESTED_MEGATRON_CORE}: pip install"
        f" megatron-core=={TESTED_MEGATRON_CORE}",
        when=version != TESTED_MEGATRON_CORE,
    )


def check_apex() -> None:
    """A web toolkit of the same name as NVIDIA's apex makes Megatron fail in odd places."""
    spec = importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
    refuse(
        "the installed package 'apex' is not NVIDIA's but an unrelated one of that name: "
        "pip uninstall apex",
        when=spec and not any((folder / "multi_tensor_apply").is_dir() for folder in folders),
    )


def check_imported_version() -> None:
    """A script beside a checkout of Megatron-LM imports that in place of what is installed."""
    import megatron.core

    # After the plus sign stands the commit of whatever repository the working folder is in.
    version = megatron.core.__version__.partition("+")[0]
    refuse(
        f"{Path(megatron.core.__file__).parent} is megatron-core {version}, tested is "
        f"{TESTED_MEGATRON_CORE}: use the script of that release",
        when=version != TESTED_MEGATRON_CORE,
    )


def check_megatron_is_not_imported() -> None:
    """Names that a script has imported from megatron cannot be replaced in it any more."""
    refuse(
        "megatron has been imported already: call megatron_dion.install() before the first import "
        "of megatron, or start the script by `python -m megatron_dion.run`",
        when=sys.modules.keys() & {"megatron.core", "megatron.training"},
    )


def check_device(device: str) -> None:
    """`--device cuda` needs a device."""
    refuse(
        "--device cuda: torch sees no CUDA device; use --device cpu",
        when=device == "cuda" and not torch.cuda.is_available(),
    )


CHECKS: tuple[Callable[[], None], ...] = (check_megatron_version, check_apex)


def prepare(argv: Sequence[str]) -> str:
    """Do all that must happen before megatron is imported, on CPU together with its import.

    Args:
        argv: The command line, of which `--device` counts.

    Returns:
        The device, `cuda` or `cpu`.

    Raises:
        ConfigurationError: There is another megatron-core, or not the device that was asked for.
    """
    for check in CHECKS:
        check()
    requested = requested_device(argv)
    device = resolve_device(requested)
    check_device(device)
    if device == "cpu":
        cpu.install(hide_gpus=requested == "cpu")
        cpu.install_megatron_patches()
    return device


def describe_single_process() -> None:
    """Without a launcher, describe a world of one process as torchrun would."""
    if "RANK" not in os.environ:
        sizes = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(sizes, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
