"""Pretrains a GPT as pretrain_gpt.py does: `python -m megatron_dion <Megatron flags>`."""

import sys

from megatron_dion.error_line import tell

if not sys.argv[1:2] or not sys.argv[1].startswith("-"):
    tell("give flags of Megatron, or use `megatron-dion SUBCOMMAND`")
    sys.exit(2)

# Only now: it imports torch.
from megatron_dion.megatron import main

main()
