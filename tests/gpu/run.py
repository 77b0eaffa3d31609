"""Functions on ranks with a GPU each, or on CPUs: `on_ranks` has torchrun start this module.

usage: python -m torch.distributed.run ... -m tests.gpu.run FUNCTION FOLDER ARGUMENT...
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.project import ROOT


def on_ranks(number: int, function: str, folder: Path, *args: str, device: str = "cuda") -> Any:
    """What a function of this module returns, by rank; skips if there are too few GPUs."""
    if device == "cuda" and torch.cuda.device_count() < number:
        pytest.skip(f"needs {number} GPUs, there is {torch.cuda.device_count()}")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), "-m", "tests.gpu.run", function, str(folder)]
    # Without the one Transformer Engine does not load the scales of delayed scaling; the other is
    # Megatron's condition for tensor parallelism before Blackwell.
    environment = {"NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment |= os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [*command, *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]


def train_fp8(*flags: str) -> Any:
    """Trains, and keeps what there is of each weight after each step."""
    from tests.fp8_emulation.checks import train_and_record
    from tests.transformer_engine.model import forms_of

    return train_and_record(flags, forms_of)


def train_shards(device: str, tp: str, dp: str, options: str) -> Any:
    """Ten steps of Dion on shards, with torch only."""
    from megatron_dion import DionConfig
    from tests.distributed import sharded

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh, config = sharded.Mesh(int(tp), int(dp)), DionConfig(**json.loads(options))
    shapes = (*sharded.TRANSFORMER, *sharded.ODD)
    result = sharded.train_shards(mesh, shapes, config, bucket=5000, device=device)
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    name, folder, *arguments = sys.argv[1:]
    kept = {"train_fp8": train_fp8, "train_shards": train_shards}[name](*arguments)
    torch.save(kept, Path(folder, f"{os.environ['RANK']}.pt"))
