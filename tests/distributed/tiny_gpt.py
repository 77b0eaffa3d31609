"""A tiny GPT to train, the flags of its runs, and what the runs leave behind."""

from pathlib import Path
from typing import Any

from megatron_dion.megatron.run_directory import read_metrics
from tests.worlds import world

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


TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000"
INSTANCES = "--num-distributed-optimizer-instances 2"


def pretrain(size: int, *flags: str) -> None:
    """Runs pretrain_gpt.py's main with the tiny model in a world."""
    world(size).train(*MODEL, *TRAINING, *flags)


def save_in_background() -> None:
    """On a rank: `--async-save` has an effect, by a process of each save.

    Megatron turns it off without a process for all saves, which asks CUDA for a device.
    """
    from megatron.training import arguments

    stock = arguments.validate_args

    def validate(args: Any, defaults: Any) -> Any:
        wanted = args.async_save
        args = stock(args, defaults)
        args.async_save = wanted
        return args

    arguments.validate_args = validate


def records_of(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind of a run's metrics."""
    return [one for one in read_metrics(run_dir / "metrics.jsonl") if one["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    """The training loss of each iteration."""
    return [entry["lm_loss"] for entry in records_of(run_dir)]
