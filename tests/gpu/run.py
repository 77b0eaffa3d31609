"""What torchrun starts on each GPU: trains, and keeps what there is of each weight after each step.

usage: python -m torch.distributed.run ... -m tests.gpu.run FOLDER FLAG...
"""

import os
import sys
from pathlib import Path

import torch

from tests.fp8_emulation.checks import train_and_record


def main() -> None:
    from tests.transformer_engine.model import forms_of

    recorded = train_and_record(sys.argv[2:], forms_of)
    torch.save(recorded, Path(sys.argv[1], f"{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main()
