"""What the two files of a Megatron dataset, PREFIX.idx and PREFIX.bin, say about themselves."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dion.megatron.errors import ConfigurationError

# megatron/core/datasets/indexed_dataset.py: magic, version, type of the tokens, sequences,
# documents + 1; then a length (int32) and an offset (int64) per sequence, and document bounds.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_TYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_HOW_TO_REMAKE = "write the data again with megatron-dion data preprocess"

_BYTES_READ_WHOLE = 256 * 2**20
_SAMPLES_OF_LARGE_FILES = 64
_TOKENS_PER_SAMPLE = 2**18


@dataclass(frozen=True)
class IndexedData:
    """A dataset whose two files fit together.

    Attributes:
        prefix: Path of both files without their suffix.
        token_type: numpy type of a token in the .bin file.
        sequences: Number of sequences, which Megatron's splits divide.
        tokens: Number of tokens.
    """

    prefix: str
    token_type: type[np.generic]
    sequences: int
    tokens: int

    def largest_token(self) -> int:
        """The largest token id; of files over 256 MiB, in samples that are spread over them."""
        if self.tokens == 0:
            return 0
        tokens = np.memmap(f"{self.prefix}.bin", dtype=self.token_type, mode="r")
        if tokens.nbytes <= _BYTES_READ_WHOLE:
            return int(tokens.max())
        last_start = len(tokens) - _TOKENS_PER_SAMPLE
        starts = np.linspace(0, last_start, _SAMPLES_OF_LARGE_FILES, dtype=np.int64)
        return max(int(tokens[start : start + _TOKENS_PER_SAMPLE].max()) for start in starts)


def open_indexed_data(prefix: str) -> IndexedData:
    """Read the index of a dataset and compare it with the size of its data.

    Raises:
        ConfigurationError: A file is missing, is not what it should be, or was cut off.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise ConfigurationError(
                f"the data {prefix} has no file {path}: give the path without .bin or .idx, "
                f"or {_HOW_TO_REMAKE}"
            )
    token_type, lengths = _read_index(index)
    tokens = int(lengths.sum(dtype=np.int64))
    expected = tokens * np.dtype(token_type).itemsize
    if data.stat().st_size != expected:
        raise ConfigurationError(
            f"{data} has {data.stat().st_size} bytes where its index promises {expected}: "
            f"{_HOW_TO_REMAKE}"
        )
    return IndexedData(prefix, token_type, len(lengths), tokens)


def read_sidecar(prefix: str) -> dict[str, Any]:
    """Read PREFIX.json, in which `megatron-dion data` describes the data; else empty.

    Raises:
        ConfigurationError: The file is not a JSON object.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON ({error}): {_HOW_TO_REMAKE}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a JSON object: {_HOW_TO_REMAKE}")
    return content


def _read_index(path: Path) -> tuple[type[np.generic], np.ndarray]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ConfigurationError(f"{path} is not the index of a Megatron dataset: {_HOW_TO_REMAKE}")
    _, version, token_code, sequences, bounds = _HEADER.unpack(header)
    if version != 1 or token_code not in _TOKEN_TYPES:
        raise ConfigurationError(
            f"{path} has format version {version} and token type {token_code}, which are not "
            f"known here: {_HOW_TO_REMAKE}"
        )
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if path.stat().st_size != expected:
        raise ConfigurationError(
            f"{path} has {path.stat().st_size} bytes where its header promises {expected}: "
            f"{_HOW_TO_REMAKE}"
        )
    lengths = np.fromfile(path, dtype=np.int32, count=sequences, offset=_HEADER.size)
    return _TOKEN_TYPES[token_code], lengths
