"""Say what a checkpoint holds, and whether it is whole.

DIR is a folder of checkpoints, of which the newest complete one is taken, or one checkpoint
(iter_0000100). For each logical matrix of Dion's: rows, columns, rank, types, and the Frobenius
norms of weight, momentum and right factor.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_dion.checkpointing import folders, hashes
from megatron_dion.checkpointing.contents import Contents
from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.error_line import tell
from megatron_dion.optimizer.record import KINDS, Record
from megatron_dion.optimizer.rules import in_order_of_layers
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.saved_matrices import SavedMatrix, saved_matrices
from megatron_dion_tools.terminal import progress_bar, quiet_imports

HEADER = ("matrix", "rows", "columns", "rank", "types", *(f"|{kind}|" for kind in KINDS))


def run(args: argparse.Namespace) -> int:
    """Print it; the exit code is 1 if the checkpoint is not whole."""
    try:
        folder = _folder(Path(args.folder), args.ckpt_step)
    except CheckpointError as error:
        raise ToolError(str(error)) from error
    try:
        contents = Contents(folder)
        problems = contents.damaged_files() or _show(contents, not args.no_norms)
        if args.verify and not problems:
            problems = _damage(contents)
    except CheckpointError as error:
        tell(error)
        return 1
    if problems:
        tell(f"{contents.folder} is NOT whole: {'; '.join(problems)}")
        return 1
    if args.verify:
        print(f"\n{contents.folder} is whole")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--ckpt-step", type=int, help="iteration, in place of the newest")
    parser.add_argument("--no-norms", action="store_true", help="do not read tensors for norms")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare all files with their hashes, read every tensor, look for gaps and for"
        " numbers that are not finite",
    )


def _folder(given: Path, step: int | None) -> Path:
    if (given / folders.MARKER).exists():
        return given
    choice = folders.choose(given, step)
    for remark in choice.remarks:
        print(remark)
    return choice.folder


def _show(contents: Contents, with_norms: bool) -> list[str]:
    """Prints what a checkpoint holds; returns what is missing in it."""
    with quiet_imports():
        import megatron.core.dist_checkpointing  # noqa: F401  (contents.common needs it)
    print("\n".join(_summary(contents)))
    matrices, problems = saved_matrices(contents)
    matrices.sort(key=lambda matrix: in_order_of_layers(matrix.name))
    if matrices:
        print()
        for line in _table(contents, matrices, with_norms):
            print(line)
    return problems


def _summary(contents: Contents) -> Iterator[str]:
    common = contents.common
    args = common.get("args")
    record = Record.of_checkpoint(common)
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
    config = record.to_dict()
    steps = common["optimizer"]["steps"]
    yield f"optimizer   dion, after {steps['dion']} steps"
    yield f"and         {record.scalar_optimizer}, after {steps['scalar']} steps"
    yield f"dion        {', '.join(f'{k} {v}' for k, v in config['config'].items())}"
    for name in ("split", "include", "exclude"):
        yield f"{name:11} {', '.join(config[name]) or 'none'}"


def _table(contents: Contents, matrices: list[SavedMatrix], with_norms: bool) -> Iterator[str]:
    width = max(len(matrix.name) for matrix in matrices)
    columns = HEADER if with_norms else HEADER[:5]
    yield _row(columns, width)
    tensors = len(matrices) * len(KINDS) if with_norms else 0
    with progress_bar("reading", total=tensors, unit="tensor") as bar:
        for matrix in matrices:
            values = [matrix.name, matrix.rows, matrix.columns, matrix.rank, _types(matrix)]
            for kind in KINDS if with_norms else ():
                values.append(f"{float(contents.read(matrix.key(kind)).float().norm()):.6g}")
                bar.update()
            yield _row(values, width)


def _row(values: Sequence[object], width: int) -> str:
    name, *rest = map(str, values)
    return " ".join([f"{name:{width}}", *(f"{value:>14}" for value in rest)])


def _types(matrix: SavedMatrix) -> str:
    short = [dtype.replace("float", "fp").replace("bfp", "bf") for dtype in matrix.dtypes]
    return short[0] if len(set(short)) == 1 else "/".join(short)


def _damage(contents: Contents) -> list[str]:
    """Reads everything; returns what is wrong."""
    found = contents.gaps()
    manifest = hashes.read_manifest(contents.folder)
    if manifest is None:
        print("\nsaved without hashes: changed bytes within a tensor cannot be seen")
    else:
        found += hashes.damage(contents.folder, manifest)
    if found:
        return found
    with progress_bar("verifying", total=len(contents.tensors), unit="tensor") as bar:
        for key in contents.tensors:
            tensor = contents.read(key)
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                found.append(f"{key} has numbers that are not finite")
            bar.update()
    return found
