"""Updates that the product does not have, beside those that it has, in a small GPT of plain torch.

    python studies/plain.py METHOD ... --output plain.jsonl

The model, the data and the batches are those of `small.args`, in float32 in one process. A method
is a name and its numbers, such as `dion:fraction=0.25,memory=0.8,gamma=1`:

    adamw       of torch
    muon        memory
    dion        fraction, memory, gamma: with gamma times the residual by rows; 0 is the paper's
    dion2       fraction, memory: Newton-Schulz on the rows of the momentum with the largest sums of
                magnitudes, which the memory then multiplies (microsoft/dion)
    dion3       as dion2, with NorMuon's second moment of rows

Each trains at its rate of start, the double and the half, and so on until the best lies between two
others; then the other seeds train at the best. Finished runs in the output are not repeated.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH, BATCH, LAYERS, HEADS, GROUPS = 1024, 128, 16, 4, 4, 2
WARMUP, DECAY, CLIP, EMBEDDING_LR = 0.1, 0.1, 1.0, 0.064
DATA = Path("data", "vocab-1024")
Run = dict[str, Any]
# Newton-Schulz coefficients of Polar Express (arXiv 2505.16932).
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class Layer(nn.Module):
    """Attention with query groups, and a gated feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        head, inner = width // HEADS, 3 * width
        sizes = {"query": width, "key": GROUPS * head, "value": GROUPS * head}
        sizes |= {"gate": inner, "up": inner}
        self.inputs = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(rows, width)) for name, rows in sizes.items()}
        )
        small = 0.02 / math.sqrt(2 * LAYERS)
        self.proj = nn.Parameter(small * torch.randn(width, width))
        self.down = nn.Parameter(small * torch.randn(width, inner))
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(width)) for _ in range(2)])

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Hidden states (b, s, width) to hidden states."""
        width = x.shape[-1]

        def heads(name: str) -> Tensor:
            return (y @ self.inputs[name].T).unflatten(-1, (-1, width // HEADS)).transpose(1, 2)

        def turned(z: Tensor) -> Tensor:
            first, second = z.chunk(2, dim=-1)
            return z * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

        y = F.rms_norm(x, (width,), self.norms[0], 1e-5)
        mixed = F.scaled_dot_product_attention(
            turned(heads("query")), turned(heads("key")), heads("value"),
            is_causal=True, enable_gqa=True,
        )  # (b, heads, s, head)  # fmt: skip
        x = x + mixed.transpose(1, 2).flatten(2) @ self.proj.T
        y = F.rms_norm(x, (width,), self.norms[1], 1e-5)
        return x + (F.silu(y @ self.inputs["gate"].T) * (y @ self.inputs["up"].T)) @ self.down.T


class Model(nn.Module):
    """A GPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ends = nn.ParameterList(
            [nn.Parameter(0.02 * torch.randn(VOCABULARY, width)) for _ in range(2)]
        )
        self.layers = nn.ModuleList([Layer(width) for _ in range(LAYERS)])
        self.norm = nn.Parameter(torch.ones(width))
        head = width // HEADS
        frequencies = 10000.0 ** (-torch.arange(0, head, 2) / head)
        self.angles = torch.outer(torch.arange(LENGTH), frequencies).repeat(1, 2)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean loss of predicting tokens (b, LENGTH + 1)."""
        x = self.ends[0][tokens[:, :-1]]
        for layer in self.layers:
            x = layer(x, self.angles)
        x = F.rms_norm(x, self.norm.shape, self.norm, 1e-5)
        return F.cross_entropy((x @ self.ends[1].T).flatten(0, 1), tokens[:, 1:].flatten())


def polar(matrix: Tensor) -> Tensor:
    """An approximation of U V^T of the singular value decomposition."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (1.02 * x.norm() + 1e-6)
    for a, b, c in POLAR:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Rows:
    """Muon, Dion2 and Dion3 of one matrix: polar factors of some rows of a momentum."""

    def __init__(self, weight: Tensor, fraction: float, memory: float, has_moment: bool) -> None:
        self.weight, self.memory, self.has_moment = weight, memory, has_moment
        self.momentum = torch.zeros_like(weight)
        self.moment = torch.zeros(weight.shape[0], 1)
        self.count = max(1, math.ceil(fraction * weight.shape[0]))

    def step(self, lr: float) -> None:
        """Moves the weight by lr times the polar factor."""
        assert self.weight.grad is not None
        self.momentum += self.weight.grad
        chosen = self.momentum.abs().sum(1).topk(self.count).indices
        update = polar(self.momentum[chosen])
        if self.has_moment:
            squares = update.square().mean(1, keepdim=True)
            self.moment[chosen] = torch.lerp(self.moment[chosen], squares, 0.05)
            levelled = update / (self.moment[chosen].sqrt() + 1e-8)
            update = levelled * (update.norm() / levelled.norm())
        self.momentum[chosen] *= self.memory
        self.weight[chosen] -= lr * update


class LowRank:
    """Dion of one matrix; its residual times gamma."""

    def __init__(self, weight: Tensor, fraction: float, memory: float, gamma: float) -> None:
        self.weight, self.memory, self.gamma = weight, memory, gamma
        self.momentum = torch.zeros_like(weight)
        self.rank = max(1, math.ceil(fraction * min(weight.shape)))
        self.right = torch.randn(weight.shape[0], self.rank) / math.sqrt(weight.shape[0])

    def step(self, lr: float) -> None:
        """Moves the weight along P, and along the rest."""
        m, n = self.weight.shape
        assert self.weight.grad is not None
        self.momentum += self.weight.grad
        left = torch.linalg.qr(self.momentum.T @ self.right).Q
        projection = self.momentum @ left
        self.right = projection / (projection.norm(dim=0) + 1e-8)
        self.weight -= lr * self.right @ left.T
        residual = self.momentum - projection @ left.T
        if self.gamma:
            length = math.sqrt((min(m, n) - self.rank) / m)
            rows = residual / (residual.norm(dim=1, keepdim=True) + 1e-12)
            self.weight -= lr * self.gamma * length * rows
            self.momentum *= self.memory
        else:
            self.momentum -= (1 - self.memory) * projection @ left.T


def optimizers(
    model: Model, method: str, lr: float
) -> tuple[torch.optim.Optimizer, list[Rows | LowRank]]:
    """AdamW with its groups, whose `base` is their learning rate, and what updates the matrices."""
    name, _, words = method.partition(":")
    numbers = {key: float(value) for key, value in (w.split("=") for w in words.split(",") if w)}
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": list(model.ends), "base": EMBEDDING_LR},
        {"params": vectors, "base": lr, "weight_decay": 0.0},
    ]
    if name == "adamw":
        groups.append({"params": matrices, "base": lr})
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=DECAY, foreach=True)
    if name == "adamw":
        return adamw, []
    if name == "dion":
        return adamw, [LowRank(p, **numbers) for p in matrices]
    rows = {"fraction": 1.0} | numbers
    return adamw, [Rows(p, **rows, has_moment=name == "dion3") for p in matrices]


def batches(text: Tensor, seed: int, count: int) -> Iterator[Tensor]:
    """Random pieces of a text, (b, LENGTH + 1)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(count):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH + 1)]


def read(name: str) -> Tensor:
    """The tokens of a text."""
    tokens = np.fromfile(DATA / f"{name}_text_document.bin", dtype=np.uint16)
    return torch.from_numpy(tokens.astype(np.int64))


def train(method: str, lr: float, seed: int, width: int, steps: int) -> Run:
    """Trains once; the loss is that of 33 thousand tokens of the validation text."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Model(width)
    adamw, own = optimizers(model, method, lr)
    warm = int(WARMUP * steps)
    for step, tokens in enumerate(batches(read("train"), seed, steps)):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        factor = (step + 1) / (WARMUP * steps) if step < warm else cosine
        for group in adamw.param_groups:
            group["lr"] = group["base"] * factor
        model.zero_grad()
        model.loss(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        with torch.no_grad():
            for each in own:
                each.weight *= 1 - lr * factor * DECAY
                each.step(lr * factor * 0.2 * math.sqrt(max(each.weight.shape)))
    with torch.no_grad():
        losses = [model.loss(tokens).item() for tokens in batches(read("validation"), 0, 16)]
    run = {"method": method, "lr": lr, "seed": seed, "width": width, "steps": steps}
    return run | {"loss": sum(losses) / len(losses)}


def missing(done: list[Run], method: str, seeds: list[int]) -> list[tuple[float, int]]:
    """The learning rates and seeds with which a method trains next."""
    mine = [run for run in done if run["method"] == method]
    first = {run["lr"]: run["loss"] for run in mine if run["seed"] == seeds[0]}
    start = 0.004 if method == "adamw" else 0.008
    wanted = [(lr, seeds[0]) for lr in (start / 2, start, 2 * start)]
    if all(lr in first for lr, _ in wanted):
        best = min(first, key=first.__getitem__)
        edge = {min(first): best / 2, max(first): best * 2}.get(best)
        wanted = [(best, seed) for seed in seeds] if edge is None else [(edge, seeds[0])]
    return [
        (lr, seed) for lr, seed in wanted if (lr, seed) not in {(r["lr"], r["seed"]) for r in mine}
    ]


def main() -> None:
    """Trains what is missing, and prints mean and standard deviation of each method at its best."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+", metavar="METHOD")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one for each run")
    parser.add_argument("--width", type=int, default=128, help="hidden size (default: 128)")
    parser.add_argument("--steps", type=int, default=256, help="of 2048 tokens (default: 256)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    arguments = parser.parse_args()

    def finished() -> list[Run]:
        lines = arguments.output.read_text().splitlines() if arguments.output.is_file() else []
        runs = [json.loads(line) for line in lines]
        here = (arguments.width, arguments.steps)
        return [run for run in runs if (run["width"], run["steps"]) == here]

    def wanted() -> list[tuple[str, float, int]]:
        runs = finished()
        return [(m, *run) for m in arguments.methods for run in missing(runs, m, arguments.seeds)]

    learn = partial(train, width=arguments.width, steps=arguments.steps)
    with ProcessPoolExecutor(arguments.jobs) as pool, arguments.output.open("a") as output:
        while jobs := wanted():
            for job in as_completed([pool.submit(learn, *job) for job in jobs]):
                print(json.dumps(job.result()), file=output, flush=True)
                print(json.dumps(job.result()), flush=True)
    for method in arguments.methods:
        mine = [run for run in finished() if run["method"] == method]
        best = min((r for r in mine if r["seed"] == arguments.seeds[0]), key=lambda r: r["loss"])[
            "lr"
        ]
        losses = torch.tensor([run["loss"] for run in mine if run["lr"] == best])
        print(f"| {method} | {best:g} | {losses.mean():.3f} ± {losses.std():.3f} |", flush=True)


if __name__ == "__main__":
    main()
