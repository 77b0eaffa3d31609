"""Worlds of ranks that train a GPT with Megatron on CPU, without importing Megatron for each.

The nursery is a process of its own that has installed the CPU platform (which changes torch for the
whole process) and imported Megatron; it forks every world.
"""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_dion_tools.local.preload import preload
from megatron_dion_tools.local.world import RankError, run_world

_FORK = multiprocessing.get_context("fork")

MODEL = (
    "--num-layers 4 --hidden-size 72 --ffn-hidden-size 200 --num-attention-heads 4"
    " --group-query-attention --num-query-groups 2 --kv-channels 18"
    " --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope"
    " --normalization RMSNorm --swiglu --disable-bias-linear"
    " --untie-embeddings-and-output-weights --init-method-std 0.05"
    " --attention-dropout 0 --hidden-dropout 0"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 250"
    " --make-vocab-size-divisible-by 8 --padded-vocab-size 256"
).split()
TRAINING = (
    "--micro-batch-size 3 --global-batch-size 12 --lr 4e-3 --min-lr 4e-4"
    " --lr-decay-style cosine --lr-warmup-iters 2 --lr-decay-iters 20 --weight-decay 0.1"
    " --clip-grad 1.0 --eval-iters 0 --eval-interval 1000 --log-interval 5 --device cpu"
).split()
DION = "--optimizer dion --use-distributed-optimizer".split()


class Nursery:
    """Starts worlds on request."""

    def __init__(self) -> None:
        self._end, child_end = _FORK.Pipe()
        self._process = _FORK.Process(target=_serve, args=(child_end,))
        self._process.start()
        child_end.close()

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `run_world`, from a process that has imported Megatron."""
        worlds: list[Any] = self.call(run_world, size, function, *args)
        return worlds

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function, which may fork worlds, in the process that has imported Megatron."""
        self._end.send((function, args))
        ok, value = self._end.recv()
        if not ok:
            raise RankError(value)
        return value

    def pretrain(self, size: int, *argv: str) -> list[Any]:
        """Runs pretrain_gpt.py's main with the tiny model in a world."""
        return self.run(size, train, [*MODEL, *TRAINING, *argv])

    def close(self) -> None:
        self._end.send(None)
        self._process.join()


def train(argv: Sequence[str]) -> None:
    """On a rank: trains as pretrain_gpt.py would."""
    from megatron_dion.megatron.launch import train as launch

    launch(argv)


def read_metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind of a run's metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    """The training loss of each iteration."""
    return [entry["lm_loss"] for entry in read_metrics(run_dir)]


def _serve(end: Connection) -> None:
    preload()
    _mock_documents()
    while (request := end.recv()) is not None:
        function, args = request
        try:
            end.send((True, function(*args)))
        except Exception as error:
            end.send((False, str(error)))


def _mock_documents() -> None:
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 1000  # documents, which are shuffled
