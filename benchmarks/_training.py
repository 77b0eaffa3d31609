"""Training runs of a small GPT through pretrain_gpt.py, on data that is drawn."""

import argparse
from dataclasses import replace

from benchmarks._common import preload_megatron
from benchmarks._models import Topology, gpt
from megatron_dion_tools.local.runs import Run, execute
from megatron_dion_tools.plan import GptShape

_DISTRIBUTED = "--use-distributed-optimizer"
_DION = ("--optimizer", "dion", _DISTRIBUTED, "--dion-rank-fraction")
# Blockwise, Megatron's default, takes each tensor rank's part for a matrix: another algorithm at
# another TP. Duplicated is one at every TP, as Dion is.
MUON_DUPLICATED = "Muon duplicated"
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "AdamW": ("--optimizer", "adam", _DISTRIBUTED),
    "Muon": ("--optimizer", "muon"),
    MUON_DUPLICATED: ("--optimizer", "muon", "--muon-tp-mode", "duplicated"),
    "Dion 1": (*_DION, "1"),
    "Dion 1/4": (*_DION, "0.25"),
    "Dion 1/16": (*_DION, "0.0625"),
}
# Muon is layer-wise distributed with bf16 weights; with float32 ones 0.19.2 fails then, and each
# data-parallel rank does all of the step.
DTYPES: dict[str, tuple[str, ...]] = {"fp32": (), "bf16": ("--bf16", _DISTRIBUTED)}

_PADDED_VOCABULARY = 1024
_FLAGS = """
    --kv-channels 64 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 1000 --padded-vocab-size 1024
    --lr 1e-4 --min-lr 0 --weight-decay 0.1 --clip-grad 1.0
    --eval-iters 0 --eval-interval 1000000 --log-interval 1000000
""".split()


def add_model_flags(parser: argparse.ArgumentParser, hidden: int, layers: int) -> None:
    """Adds the flags of `model_flags`, with their defaults."""
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=8, help="samples of an iteration")


def shape_of(args: argparse.Namespace) -> GptShape:
    """The model that the flags describe."""
    return replace(gpt(args.hidden, args.layers), vocab=_PADDED_VOCABULARY)


def model_flags(args: argparse.Namespace, topology: Topology) -> list[str]:
    """Flags of pretrain_gpt.py for the model, the ranks, the batch that they share, the device."""
    shape, sequence = shape_of(args), str(args.sequence)
    tensor = ["--tensor-model-parallel-size", str(topology.tp), "--sequence-parallel"]
    return [
        *_FLAGS,
        *("--num-layers", str(args.layers), "--hidden-size", str(args.hidden)),
        *("--ffn-hidden-size", str(shape.ffn), "--num-attention-heads", str(shape.heads)),
        *("--seq-length", sequence, "--max-position-embeddings", sequence),
        *("--micro-batch-size", str(args.batch // topology.dp)),
        *("--global-batch-size", str(args.batch)),
        *(tensor if topology.tp > 1 else ()),
        *("--device", args.device),
    ]


def prepare(device: str) -> None:
    """Makes this process a parent of ranks that train."""
    if device == "cuda":
        return  # importing Megatron would bring the parent a CUDA context (not run here)
    preload_megatron()
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 1000  # documents, which are shuffled at each start


def train(run: Run) -> None:
    """Trains, and leaves what the run writes in its folder.

    Raises:
        RunFailed: with the end of the run's log.
    """
    execute([run], jobs=run.processes, report=lambda line: None)
