"""A tiny GPT to train, the flags of its runs, and what the runs leave behind."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.worlds import in_host, world

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
    """Worlds of new processes, by a fixture; `tests.worlds` has them without one."""

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls a function on every rank of new processes."""
        return world(size).fork(function, *args)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function, which may fork worlds, in the process that has imported Megatron."""
        return in_host(function, *args)

    def pretrain(self, size: int, *argv: str) -> list[Any]:
        """Runs pretrain_gpt.py's main with the tiny model in a world."""
        return self.run(size, train, [*MODEL, *TRAINING, *argv])


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
