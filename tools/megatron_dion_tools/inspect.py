"""Say what a checkpoint holds and, with --verify, whether it is whole.

DIR is a folder of checkpoints, of which the newest complete one is taken, or one checkpoint
(iter_0000100). For each logical matrix of Dion's: rows, columns, rank and types.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_dion.checkpointing import folders, hashes
from megatron_dion.checkpointing.contents import Contents
from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.error_line import tell
from megatron_dion.optimizer.record import (
    DION_PREFIX,
    KINDS,
    MOMENTUM,
    RIGHT_FACTOR,
    WEIGHT,
    Record,
)
from megatron_dion.optimizer.rules import in_order_of_layers
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.terminal import quiet_imports


class SavedMatrix(NamedTuple):
    """A logical matrix in a checkpoint: m, n, r, and the types of its tensors."""

    name: str
    rows: int
    columns: int
    rank: int
    types: str

    def key(self, kind: str) -> str:
        """Return the checkpoint's key of a tensor, one of `KINDS`."""
        return f"{DION_PREFIX}.{kind}.{self.name}"


def saved_matrices(contents: Contents) -> tuple[list[SavedMatrix], list[str]]:
    """Return all logical matrices, and what is missing or does not fit together."""
    matrices, problems = [], []
    start = f"{DION_PREFIX}.{WEIGHT}."
    for name in (key.removeprefix(start) for key in contents.tensors if key.startswith(start)):
        entries = {kind: contents.tensors.get(f"{DION_PREFIX}.{kind}.{name}") for kind in KINDS}
        there = {kind: entry for kind, entry in entries.items() if entry is not None}
        if missing := [kind for kind in KINDS if kind not in there]:
            problems.append(f"{name} has no {' and no '.join(missing)}")
            continue
        sizes = {kind: tuple(entry.size) for kind, entry in there.items()}
        if sizes[MOMENTUM] != sizes[WEIGHT] or sizes[RIGHT_FACTOR][0] != sizes[WEIGHT][0]:
            listed = ", ".join(f"{kind} {size}" for kind, size in sizes.items())
            problems.append(f"{name}: {listed} do not fit together")
        types = [str(entry.properties.dtype) for entry in there.values()]
        types = types if len(set(types)) > 1 else types[:1]
        short = "/".join(types).replace("torch.", "").replace("float", "fp").replace("bfp", "bf")
        rows, columns = sizes[WEIGHT]
        matrices.append(SavedMatrix(name, rows, columns, sizes[RIGHT_FACTOR][1], short))
    return sorted(matrices, key=lambda matrix: in_order_of_layers(matrix.name)), problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--ckpt-step", type=int, help="iteration, in place of the newest")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare all files with their hashes, read every tensor, and look for numbers that are"
        " not finite",
    )


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint holds; the exit code is 1 if it is not whole."""
    try:
        folder = args.folder
        if not (folder / folders.MARKER).exists():
            choice = folders.choose(folder, args.ckpt_step)
            folder = choice.folder
            print("".join(f"{remark}\n" for remark in choice.remarks), end="")
    except CheckpointError as error:
        raise ToolError(str(error)) from error
    try:
        problems = _examine(Contents(folder), args.verify)
    except CheckpointError as error:
        tell(error)
        return 1
    if problems:
        tell(f"{folder} is NOT whole: {'; '.join(problems)}")
    elif args.verify:
        print(f"\n{folder} is whole")
    return 1 if problems else 0


def _examine(contents: Contents, verify: bool) -> list[str]:
    """Print what a checkpoint holds and return what is wrong with it."""
    with quiet_imports():
        import megatron.core.dist_checkpointing  # noqa: F401  (contents.common needs it)
    print("\n".join(_summary(contents)))
    matrices, problems = saved_matrices(contents)
    if verify and not problems:
        problems = _verify(contents)
    width = max((len(matrix.name) for matrix in matrices), default=0)
    if matrices:
        print()
        for name, *rest in (("matrix", *SavedMatrix._fields[1:]), *matrices):
            print(" ".join([f"{name:{width}}", *(f"{value:>14}" for value in rest)]))
    return problems


def _summary(contents: Contents) -> Iterator[str]:
    common = contents.common
    args = common.get("args")
    record = Record.of_state(common.get("optimizer", {}))
    size = sum(path.stat().st_size for path in contents.folder.iterdir())
    yield f"checkpoint  {contents.folder}"
    yield f"iteration   {common.get('iteration')}"
    yield f"size        {size / 1e6:.1f} MB in {len(contents.tensors)} tensors"
    yield f"hashes      {'none' if hashes.read_manifest(contents.folder) is None else 'SHA-256'}"
    if args is not None:
        names = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
        world, tensor, pipeline = (getattr(args, name, "?") for name in names)
        experts = getattr(args, "expert_model_parallel_size", 1)
        yield f"saved by    {world} ranks, TP{tensor} PP{pipeline} EP{experts}"
    if record is None:
        state = "" if "optimizer" in common else ", without its state"
        yield f"optimizer   {getattr(args, 'optimizer', 'unknown')}{state}"
        return
    config, steps = record.to_dict(), common["optimizer"]["steps"]
    yield f"optimizer   dion, after {steps['dion']} steps"
    yield f"and         {record.scalar_optimizer}, after {steps['scalar']} steps"
    yield f"dion        {', '.join(f'{k} {v}' for k, v in config['config'].items())}"
    for name in ("split", "include", "exclude"):
        yield f"{name:11} {', '.join(config[name]) or 'none'}"


def _verify(contents: Contents) -> list[str]:
    """Read everything, and return what is wrong."""
    problems: list[str] = []
    manifest = hashes.read_manifest(contents.folder)
    if manifest is None:
        print("saved without hashes: changed bytes within a tensor cannot be seen")
    else:
        problems += hashes.damage(contents.folder, manifest)
    for key in contents.tensors if not problems else ():
        tensor = contents.read(key)[key]
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            problems.append(f"{key} has numbers that are not finite")
    return problems
