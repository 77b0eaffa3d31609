"""Flags of pretrain_gpt.py as files of cases and studies write them."""

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def read_flags(path: Path) -> tuple[str, ...]:
    """The flags of an arguments file; `#` starts a comment."""
    return tuple(shlex.split(path.read_text(encoding="utf-8"), comments=True))


def split_flags(text: str) -> tuple[str, ...]:
    """The flags of one line."""
    return tuple(shlex.split(text))


def effective(flags: Sequence[str]) -> tuple[str, ...]:
    """The flags that count: of a flag given twice, the later one, at the place of the first."""
    starts = [i for i, flag in enumerate(flags) if flag.startswith("--")]
    groups = [flags[a:b] for a, b in pairwise([*starts, len(flags)])]
    last = {group[0].partition("=")[0]: group for group in groups}
    return tuple(part for group in last.values() for part in group)
