"""Run directories as pretrain_gpt.py leaves them, without a run."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_dion.optimizer.diagnostics import MatrixDiagnostics, Snapshot, to_record

LAYERS, HIDDEN, VOCAB = 3, 64, 512
ITERATIONS, RESUMED_AFTER, TOKENS = 200, 120, 2048
# Rows and columns of the matrices of a layer.
MATRICES = {
    "mlp.linear_fc1.weight[gate]": (160, HIDDEN),
    "mlp.linear_fc1.weight[up]": (160, HIDDEN),
    "mlp.linear_fc2.weight": (HIDDEN, 160),
    "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
    "self_attention.linear_qkv.weight[key]": (HIDDEN // 2, HIDDEN),
}
DEFAULTS = {"optimizer": "adam", "lr": None, "seed": 1234, "dion_rank_fraction": 0.25}
ARGUMENTS = DEFAULTS | {"optimizer": "dion", "lr": 0.008, "train_iters": ITERATIONS}
SIZES = {"world_size": 4, "tensor_model_parallel_size": 2, "data_parallel_size": 2}
SIZES |= {f"{name}_parallel_size": 1 for name in ("pipeline_model", "context", "expert_model")}


def write_run(
    folder: Path,
    records: Sequence[dict[str, Any]] | None = None,
    reason: str = "",
    **arguments: Any,
) -> Path:
    """A run with Dion that was resumed once, unless the arguments say otherwise.

    Args:
        folder: where it goes.
        records: of metrics.jsonl; of all iterations by default.
        reason: why matrices are Dion's; none are where it is empty.
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
    starts = [
        SIZES
        | {"iteration": done, "tokens": TOKENS * done, "time": f"2026-11-24T{hour}:55:02+00:00"}
        for done, hour in ((0, 19), (RESUMED_AFTER, 20))
        if any(record["iteration"] > done for record in records)
    ]
    write_lines(folder / "starts.jsonl", starts)
    if reason:
        (folder / "routing.tsv").write_text(routing(reason))
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
    return {
        "kind": "train",
        "iteration": iteration,
        "lm_loss": loss,
        "grad_norm": 10 / math.sqrt(iteration),
        "lr": 0.008 * min(1, iteration / 20),
        "tokens": TOKENS * iteration,
        "iteration_seconds": 9.0 if iteration in (1, RESUMED_AFTER + 1) else 0.5,
        "optimizer_seconds": 0.05,
        "optimizer_bytes": 1000,
        "skipped": loss is None,
    }


def snapshot(iteration: int) -> Snapshot:
    """Of deeper layers more is captured."""
    matrices = [
        MatrixDiagnostics(*matrix, 0.5 + 0.1 * layer + 0.01 * kind, 0.02 * iteration, 0.5)
        for layer in range(LAYERS)
        for kind, matrix in enumerate(matrices_of(layer))
    ]
    return Snapshot(iteration, tuple(matrices))


def matrices_of(layer: int) -> Iterator[tuple[str, int, int, int]]:
    for kind, (rows, columns) in MATRICES.items():
        yield f"decoder.layers.{layer}.{kind}", rows, columns, min(rows, columns) // 4


def routing(reason: str) -> str:
    lines = ["parameter\tshape\toptimizer\treason\tmatrix\trows\tcolumns\trank"]
    for layer in range(LAYERS):
        lines.append(f"decoder.layers.{layer}.input_layernorm.weight\t{HIDDEN}\tadam\t1-D\t\t\t\t")
        for name, rows, columns, rank in matrices_of(layer):
            parameter = f"{name.partition('[')[0]}\t{rows}x{columns}\tdion\t{reason}"
            lines.append(f"{parameter}\t{name}\t{rows}\t{columns}\t{rank}")
    lines.append(f"embedding.word_embeddings.weight\t{VOCAB}x{HIDDEN}\tadam\tembedding\t\t\t\t")
    return "\n".join(lines) + "\n"
