"""What commands show and hide on the terminal."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(description: str, total: int, unit: str) -> "tqdm[NoReturn]":
    """Return a bar on stderr, to be moved by its `update`; silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(
        desc=description, total=total, unit=unit, unit_scale=True, file=sys.stderr, disable=None
    )


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide the warnings that importing Megatron prints about optional packages."""
    previous_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)
