"""Run directories as pretrain_gpt.py leaves them, without a run."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_dion.megatron.arguments import DION_DEFAULTS
from megatron_dion.optimizer.diagnostics import MatrixDiagnostics, Snapshot, to_record

LAYERS, HIDDEN, FFN, VOCAB = 3, 64, 160, 512
ITERATIONS, RESUMED_AFTER, TOKENS = 200, 120, 2048
# Rows and columns of the matrices of a layer: 4 heads, 2 query groups, a gate.
MATRICES = {
    "mlp.linear_fc1.weight[gate]": (FFN, HIDDEN),
    "mlp.linear_fc1.weight[up]": (FFN, HIDDEN),
    "mlp.linear_fc2.weight": (HIDDEN, FFN),
    "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
    "self_attention.linear_qkv.weight[query]": (HIDDEN, HIDDEN),
    "self_attention.linear_qkv.weight[key]": (HIDDEN // 2, HIDDEN),
    "self_attention.linear_qkv.weight[value]": (HIDDEN // 2, HIDDEN),
}
DEFAULTS: dict[str, Any] = {
    "num_layers": None,
    "hidden_size": None,
    "ffn_hidden_size": None,
    "num_attention_heads": None,
    "group_query_attention": False,
    "num_query_groups": 1,
    "kv_channels": None,
    "swiglu": False,
    "padded_vocab_size": None,
    "make_vocab_size_divisible_by": 128,
    "untie_embeddings_and_output_weights": False,
    "add_bias_linear": True,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": None,
    "seq_length": None,
    "num_experts": None,
    "multi_latent_attention": False,
    "attention_output_gate": False,
    "mtp_num_layers": None,
    "experimental_attention_variant": None,
    "tensor_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "num_distributed_optimizer_instances": 1,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "ddp_bucket_size": None,
    "fp8_param_gather": False,
    "bf16": False,
    "fp16": False,
    "micro_batch_size": None,
    "global_batch_size": None,
    "recompute_granularity": None,
    "train_iters": None,
    "optimizer": "adam",
    "lr": None,
    "seed": 1234,
    **DION_DEFAULTS,
}
ARGUMENTS: dict[str, Any] = {
    **DEFAULTS,
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "swiglu": True,
    "padded_vocab_size": VOCAB,
    "untie_embeddings_and_output_weights": True,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "seq_length": 256,
    "tensor_model_parallel_size": 2,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "train_iters": ITERATIONS,
    "optimizer": "dion",
    "lr": 0.008,
    "data_parallel_size": 2,
    "use_layer_wise_distributed_optimizer": False,
}
SIZES = {
    "world_size": 4,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "data_parallel_size": 2,
}


def write_run(
    folder: Path,
    records: Sequence[dict[str, Any]] | None = None,
    routing: str | None = None,
    **arguments: Any,
) -> Path:
    """A run with Dion that was resumed once, unless it is told otherwise.

    Args:
        folder: where it goes.
        records: of metrics.jsonl; of all iterations by default.
        routing: routing.tsv; of the model by default, none where it is empty.
        arguments: those that differ from `ARGUMENTS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "command_line": ["pretrain_gpt.py", "--optimizer", "dion", "--data-path", "a b"],
        "platform": "cpu",
        "world_size": 4,
        "versions": {"torch": "2.9.0", "megatron-core": "0.19.2"},
        "git_revision": None,
        "arguments": {**ARGUMENTS, **arguments},
        "defaults": DEFAULTS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    records = list(metrics()) if records is None else records
    write_lines(folder / "metrics.jsonl", records)
    last = max((record["iteration"] for record in records), default=0)
    starts = ((0, "2026-11-24T19:55:02+00:00"), (RESUMED_AFTER, "2026-11-24T20:55:02+00:00"))
    write_lines(
        folder / "starts.jsonl",
        [
            {
                "iteration": iteration,
                "tokens": TOKENS * iteration,
                "time": time,
                **SIZES,
                "unigram_entropy": 6.5,
            }
            for iteration, time in starts
            if iteration < last
        ],
    )
    if routing != "":
        (folder / "routing.tsv").write_text(routing or routing_of_model())
    return folder


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics() -> Iterator[dict[str, Any]]:
    """A loss that falls evenly from 8 to 4, so that it is known where its curve is."""
    for iteration in range(1, ITERATIONS + 1):
        yield train_record(iteration, loss_at(iteration))
        if iteration % 50 == 0:
            loss = loss_at(iteration) + 0.5
            yield {"kind": "validation", "iteration": iteration, "lm_loss": loss}
            yield to_record(snapshot(iteration))


def loss_at(iteration: int) -> float:
    return 8 - 4 * (iteration - 1) / (ITERATIONS - 1)


def train_record(iteration: int, loss: float | None) -> dict[str, Any]:
    first = iteration in (1, RESUMED_AFTER + 1)
    return {
        "kind": "train",
        "iteration": iteration,
        "lm_loss": loss,
        "grad_norm": 10 / math.sqrt(iteration),
        "lr": 0.008 * min(1, iteration / 20),
        "tokens": TOKENS * iteration,
        "iteration_seconds": 9.0 if first else 0.5,
        "optimizer_seconds": 0.05,
        "optimizer_bytes": 1000,
        "householder_fallbacks": 0,
        "skipped": loss is None,
    }


def snapshot(iteration: int) -> Snapshot:
    """Of deeper layers more is captured."""
    return Snapshot(
        iteration,
        tuple(
            MatrixDiagnostics(
                name=name,
                rows=rows,
                columns=columns,
                rank=rank,
                captured=0.5 + 0.1 * layer + 0.01 * kind,
                update_norm=0.02,
                momentum_norm=0.5,
            )
            for layer in range(LAYERS)
            for kind, (name, rows, columns, rank) in enumerate(matrices_of(layer))
        ),
    )


def matrices_of(layer: int) -> Iterator[tuple[str, int, int, int]]:
    for kind, (rows, columns) in MATRICES.items():
        yield f"decoder.layers.{layer}.{kind}", rows, columns, -(-min(rows, columns) // 4)


def routing_of_model(layers: int = LAYERS, reason: str = "linear layer") -> str:
    lines = ["parameter\tshape\toptimizer\treason\tmatrix\trows\tcolumns\trank"]
    for layer in range(layers):
        norm = f"decoder.layers.{layer}.input_layernorm.weight\t{HIDDEN}\tadam\t1-D\t\t\t\t"
        lines.append(norm)
        for name, rows, columns, rank in matrices_of(layer):
            parameter = name.partition("[")[0]
            start = f"{parameter}\t{rows}x{columns}\tdion\t{reason}"
            lines.append(f"{start}\t{name}\t{rows}\t{columns}\t{rank}")
    words = f"embedding.word_embeddings.weight\t{VOCAB}x{HIDDEN}"
    lines.append(f"{words}\tadam\tembedding or output layer\t\t\t\t")
    return "\n".join(lines) + "\n"
