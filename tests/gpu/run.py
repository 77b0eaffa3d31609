"""What torchrun starts on each GPU: trains, and keeps what there is of each weight after each step.

usage: python -m torch.distributed.run ... -m tests.gpu.run FOLDER FLAG...
"""

import os
import sys
from pathlib import Path

import torch

from tests.fp8_emulation.checks import train_and_keep


def main() -> None:
    from tests.transformer_engine.model import forms_of

    kept = train_and_keep(sys.argv[2:], forms_of)
    torch.save(kept, Path(sys.argv[1], f"{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main()
