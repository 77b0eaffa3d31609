"""Flags of pretrain_gpt.py as `.args` and YAML files write them."""

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def read_flags(path: Path) -> tuple[str, ...]:
    """Read the flags of an `.args` file; `#` starts a comment."""
    return tuple(shlex.split(path.read_text(encoding="utf-8"), comments=True))


def effective(flags: Sequence[str]) -> tuple[str, ...]:
    """Drop what argparse would ignore: of a flag given twice, only the later one stays."""
    starts = [i for i, flag in enumerate(flags) if flag.startswith("--")]
    groups = [flags[a:b] for a, b in pairwise([*starts, len(flags)])]
    last = {group[0].partition("=")[0]: group for group in groups}
    return tuple(part for group in last.values() for part in group)
